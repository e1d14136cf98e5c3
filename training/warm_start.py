"""Initial weights of a new training from the networks of an earlier one, without out-of-fold scores that learn from
labels they must not know: the network that is to score fold k begins with one that never saw these lesions."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from data_pipelines.image_dataset import GATE_FOLD, DatasetVersion, open_dataset
from training.config import NETWORK, TrainingConfig
from training.networks import CHECKPOINT_FILE
from training.run_folder import network_name, read_identity, read_network

_PREFIX = "backbone."


def write_initial_weights(run: Path, version: DatasetVersion, config: TrainingConfig, out: Path) -> str:
    """Writes the averaged backbone weights of each network of a finished run to `<out>/<network>.pt`; the head starts
    anew.

    Args:
        run: folder of the earlier training.
        version: the data set that is trained on now; the earlier one is looked for beside it.
        config: of the training that they are for.

    Returns:
        The path with `{network}` for the network's name, for `model.weights`.

    Raises:
        ValueError: no run, networks or data set to be found, another backbone, or a network that has seen lesions of
            the fold it would have to score.
    """
    before, digest = read_identity(run)
    if before.model.backbone != config.model.backbone:
        raise ValueError(f"{run} trained {before.model.backbone}, not {config.model.backbone}")
    if version.images_path is None:
        raise ValueError(f"dataset {version.path} has no pictures")
    if digest != version.digest:
        _check_folds(open_dataset(version.path.parent / digest[:12]), version)
    names = [network_name(fold) for fold in (None, *version.training_folds)]
    networks = {name: read_network(run, name) for name in names}
    missing = [name for name, network in networks.items() if network is None]
    if missing:
        raise ValueError(f"{run} has no finished {', '.join(missing)}")
    out.mkdir(parents=True, exist_ok=True)
    for name, network in networks.items():
        assert network is not None
        state = torch.load(Path(network["checkpoint"]) / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
        backbone = {
            key.removeprefix(_PREFIX): value for key, value in state["average"].items() if key.startswith(_PREFIX)
        }
        temporary = out / f"{name}.tmp"
        torch.save(backbone, temporary)
        os.replace(temporary, out / f"{name}.pt")
    return str(out / f"{NETWORK}.pt")


def _check_folds(before: DatasetVersion, now: DatasetVersion) -> None:
    if before.num_folds != now.num_folds:
        raise ValueError(f"its data set has {before.num_folds} folds, this one {now.num_folds}")
    then = before.lesions.drop_duplicates("group").set_index("group")["fold"]
    folds = now.lesions.drop_duplicates("group").set_index("group")["fold"]
    shared = folds.to_frame("now").join(then.rename("then"), how="inner")
    # What trained before must not be scored now by a network that saw it; the gate split is never to be trained on.
    moved = shared[(shared["then"] != GATE_FOLD) & (shared["now"] != shared["then"])]
    if len(moved):
        raise ValueError(
            f"{len(moved)} of {len(shared)} groups are in another fold than in {before.path}: its networks have seen "
            "lesions that they would have to score"
        )
