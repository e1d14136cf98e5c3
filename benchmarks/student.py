"""The network that a training run taught by distillation, as engines in float32 and int8, and how well it ranks lesions
beside the model that it is to replace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.image_dataset import DatasetVersion
from data_pipelines.lesion_pictures import drawn, read_pictures
from modeling.bundle import Bundle
from modeling.bundle_manifest import sha256_file
from modeling.engine_candidates import CPU_ENGINES, candidates_for
from modeling.engine_interface import Engine, EngineOutput
from modeling.engine_parity import Lesions
from modeling.engine_timing import BUCKETS
from modeling.engines import create_engine
from modeling.image_scorer import ExportableScorer
from modeling.metrics import partial_auc_above_tpr, risk, roc_auc
from modeling.network_file import NetworkFile
from modeling.network_precision import Int8Recipe, cpu_activations, write_int8
from modeling.onnx_export import export_onnx
from modeling.recorded_answers import softmax
from ray_jobs.export_engine import gate_lesions
from training.networks import load_network
from training.run_folder import network_name, read_identity, read_network

_BATCH = 32


@dataclass(frozen=True)
class OwnPictures:
    """An engine that scores as many of its own pictures as it is given: another model reads another size."""

    engine: Engine
    pictures: np.ndarray

    @property
    def name(self) -> str:
        return self.engine.name

    def run(self, images: np.ndarray, with_cam: bool = False) -> EngineOutput:
        return self.engine.run(self.pictures[: len(images)], with_cam)

    def warm_up(self, batch: int) -> None:
        self.engine.warm_up(batch)


def student_networks(run: Path, version: DatasetVersion, folder: Path, seed: int = 0) -> tuple[int, list[NetworkFile]]:
    """The refit of a run as ONNX files in `folder`, float32 and int8, and its input size.

    Raises:
        ValueError: a run on another data set, or without a finished refit.
    """
    config, digest = read_identity(run)
    if digest != version.digest:
        raise ValueError(f"run {run} was trained on data set {digest}, not on {version.digest}")
    found = read_network(run, network_name(None))
    if found is None:
        raise ValueError(f"run {run} has no finished {network_name(None)}")
    scorer = ExportableScorer([load_network(Path(found["checkpoint"]), config, version.task)], config.model.num_views)
    size, paths = config.model.input_size, {name: folder / f"student-{name}.onnx" for name in ("fp32", "int8")}
    export_onnx(scorer.eval(), size, paths["fp32"])
    recipe = Int8Recipe(float_layers=0.1)
    pictures = read_pictures(version, drawn(version.training_positions, recipe.pictures, seed), size)
    write_int8(paths["fp32"], paths["int8"], pictures, recipe, cpu_activations())
    networks = [
        NetworkFile(uri=str(path), sha256=sha256_file(path), precision=name, name=name) for name, path in paths.items()
    ]
    return size, networks


def ranking(engine: Engine, bundle: Bundle, lesions: Lesions) -> dict[str, float]:
    """AUC, and pAUC above 80 % sensitivity, of the malignant classes' probability on lesions of the gate split."""
    starts = range(0, len(lesions.images), _BATCH)
    logits = np.concatenate([engine.run(lesions.images[start : start + _BATCH]).logits for start in starts])
    risks = risk(softmax(logits.astype(np.float64)), bundle.task)
    return {"auc": roc_auc(lesions.malignant, risks), "pauc": partial_auc_above_tpr(lesions.malignant, risks)}


def student_engines(
    run: Path, version: DatasetVersion, bundle: Bundle, folder: Path, lesions: int = 1500, seed: int = 0
) -> tuple[dict[str, list[Engine]], dict[str, dict[str, Any]]]:
    """Engines by name, as many of each as fit on the cores, and by name AUC and pAUC with their differences from the
    bundle's network in float32 on the same lesions of the gate split."""
    size, networks = student_networks(run, version, folder, seed)
    reference = ranking(create_engine(bundle), bundle, gate_lesions(version, bundle, lesions, seed))
    own = gate_lesions(version, bundle, lesions, seed, size)
    engines: dict[str, list[Engine]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for network in networks:
        known: dict[str, dict[str, float]] = {}
        for candidate in candidates_for(network, BUCKETS, CPU_ENGINES):
            made = [create_engine(bundle, candidate.choice) for _ in range(candidate.slots)]
            engines[candidate.name] = [OwnPictures(engine, own.images) for engine in made]
            # The number of threads changes no ranking.
            runtime = candidate.choice["engine"]
            if runtime not in known:
                known[runtime] = ranking(made[0], bundle, own)
            found = known[runtime]
            facts[candidate.name] = {
                "precision": candidate.precision,
                "max_delta_p": None,
                "delta_auc": found["auc"] - reference["auc"],
                "delta_pauc": found["pauc"] - reference["pauc"],
                "verdict": f"another model: AUC {found['auc']:.4f}, pAUC {found['pauc']:.4f}",
            }
    return engines, facts
