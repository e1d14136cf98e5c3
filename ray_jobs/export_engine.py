"""Bundle -> candidate engines, judged by torch's answers and by lesions of the gate split, timed on this device -> an
engine set, under `engine_sets` and, for a registered model, in MLflow beside the version."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from data_pipelines.image_dataset import DatasetVersion, open_dataset
from data_pipelines.lesion_pictures import drawn, read_pictures
from modeling.bundle import Bundle, load_bundle
from modeling.engine_candidates import (
    CPU_ENGINES,
    GPU_ENGINES,
    candidates_for,
    float16_has_use,
    int8_has_use,
    unavailable_engines,
)
from modeling.engine_parity import Lesions, ParityLimits
from modeling.engine_selection import measure_candidates
from modeling.engine_set import (
    Candidate,
    CandidateReport,
    EngineSet,
    Objective,
    device_key,
    find_engine_set,
    networks_folder,
)
from modeling.engine_timing import BUCKETS
from modeling.network_file import keep_network
from modeling.network_precision import Activations, Int8Recipe, cpu_activations, write_float16, write_int8
from modeling.registry import ModelVersion, Registry, find_model
from ray_jobs.job import JobConfig, Location, run_job, say
from store.synced_files import folder_lock, replacing, unfinished_folder

BETTER_INT8 = "int8-better"
# Networks of earlier engine sets stay so long: a running service may still start replicas with them.
KEPT_DAYS = 30


class ExportEngineConfig(JobConfig):
    model: str = Field("candidate", description="alias, version, or path of a bundle")
    dataset: Location | None = Field(None, description="the data set; without it float32 engines only are tried")
    lesions: int = Field(
        1500, ge=2, description="at most so many of the gate split are compared on, half of them malignant if there are"
    )
    rounds: int = Field(7, ge=1, le=1000, description="alternating timing rounds; the median counts")
    enough_s: float = Field(
        120, gt=0, description="seconds of timing after which no further round starts, beyond three"
    )
    objective: Objective = Field("throughput", description="throughput of the whole device, or latency of one run")
    limits: ParityLimits = Field(default_factory=ParityLimits)
    int8: Int8Recipe | None = Field(Int8Recipe(float_layers=0.1), description="null: no int8 engines")
    better_int8: Int8Recipe | None = Field(
        Int8Recipe(pictures=128, calibration="percentile", float_layers=0.25),
        description="tried where the first one is refused",
    )
    seed: int = Field(0, ge=0, description="draws the lesions and the pictures to calibrate with")
    engine_sets: Location = "engine_sets"
    tracking_uri: Location = "sqlite:///mlflow.db"
    artifact_root: Location = "mlflow-artifacts"
    model_name: str = "dermray"


def gate_lesions(
    version: DatasetVersion, bundle: Bundle, number: int, seed: int, input_size: int | None = None
) -> Lesions:
    """Lesions of the gate split as the bundle's network reads them, or a network of another `input_size`.

    Raises:
        ValueError: not the data set that the bundle was trained on, or one without pictures or a gate split.
    """
    if version.digest != bundle.manifest.dataset_digest:
        # In another version a gate lesion may have trained this model.
        raise ValueError(
            f"dataset {version.path} is version {version.digest[:12]}; the bundle was trained on "
            f"{bundle.manifest.dataset_digest[:12]} (give that version's folder, or null to try float32 engines only)"
        )
    gate = version.gate_positions
    if not len(gate):
        raise ValueError(f"dataset {version.path} has no gate split to compare engines on")
    malignant = version.task.malignant_mask[version.lesions["label"].to_numpy(np.int64)[gate]]
    # Where one lesion in a thousand is malignant, a random sample would hold one or two. Neither AUC nor sensitivity
    # depends on how many benign ones stand beside them.
    cancers = drawn(gate[malignant], max(number // 2, number - int((~malignant).sum())), seed)
    positions = np.sort(np.concatenate([cancers, drawn(gate[~malignant], number - len(cancers), seed)]))
    rows = version.lesions.iloc[positions]
    return Lesions(
        images=read_pictures(version, positions, input_size or bundle.manifest.input_size),
        malignant=version.task.malignant_mask[rows["label"].to_numpy(np.int64)],
        groups=rows["group"].to_numpy(str),
    )


class NetworkWriter:
    """Makes the bundle's network in other precisions, calibrated on rows that train.

    Args:
        unfinished: where they are made; what is not kept goes with it.

    Attributes:
        not_made: a refused candidate for each network that could not be made.
    """

    def __init__(self, bundle: Bundle, version: DatasetVersion, unfinished: Path, seed: int):
        self.not_made: list[CandidateReport] = []
        self._bundle, self._version, self._unfinished, self._seed = bundle, version, unfinished, seed

    def keep(self, engine_set: EngineSet, folder: Path) -> EngineSet:
        """Moves the networks that passed into the engine set's folder; returns the set with their places."""
        kept = {uri: str(folder / Path(uri).name) for uri in engine_set.network_uris(chosen=False)}
        for made, target in kept.items():
            Path(made).replace(target)
        return engine_set.with_networks_at(kept)

    def float16(self) -> list[Candidate]:
        """Candidates that compute in float16; none where the network cannot be converted."""
        return self._candidates("fp16", "fp16", lambda path: write_float16(self._bundle.onnx_path, path))

    def int8(
        self, recipe: Int8Recipe, name: str = "int8", engines: tuple[str, ...] = CPU_ENGINES + GPU_ENGINES
    ) -> list[Candidate]:
        """Candidates with an int8 network, for this processor and for TensorRT; none where it cannot be made."""
        kinds = {cpu_activations(): CPU_ENGINES, "int8": GPU_ENGINES}
        chosen = {kind: tuple(e for e in names if e in engines) for kind, names in kinds.items()}
        useful = {kind: names for kind, names in chosen.items() if int8_has_use(names)}
        if not useful:
            say(f"{name}: no engine here has int8 arithmetic: not tried")
        return [found for kind, names in useful.items() for found in self._int8(recipe, name, kind, names)]

    def _int8(
        self, recipe: Int8Recipe, name: str, activations: Activations, engines: tuple[str, ...]
    ) -> list[Candidate]:
        def write(path: Path) -> None:
            ranges = f"{recipe.calibration} of {recipe.pictures} training pictures"
            say(f"{name}: {activations} inputs of layers, ranges by {ranges}")
            positions = drawn(self._version.training_positions, recipe.pictures, self._seed)
            pictures = read_pictures(self._version, positions, self._bundle.manifest.input_size)
            kept = write_int8(self._bundle.onnx_path, path, pictures, recipe, activations, say)
            if kept:
                say(f"{name}: {len(kept)} layers stay float32: {', '.join(kept[:4])}{' ...' if len(kept) > 4 else ''}")

        return self._candidates(name, "int8", write, engines)

    def _candidates(
        self,
        name: str,
        precision: str,
        write: Callable[[Path], None],
        engines: tuple[str, ...] = CPU_ENGINES + GPU_ENGINES,
    ) -> list[Candidate]:
        path = self._unfinished / f"{name}.onnx"
        try:
            write(path)
        except Exception as error:  # whatever a converter raises costs this precision, not the other engines
            reason = f"the network cannot be made: {' '.join(str(error).split()) or type(error).__name__}"
            say(f"{name}: {reason}")
            candidate = Candidate(name=name, choice={}, precision=precision)
            self.not_made.append(CandidateReport(candidate=candidate, passed=False, reason=reason))
            return []
        return candidates_for(keep_network(path, self._unfinished, precision, name), BUCKETS, engines)


def clear_networks(folder: Path, in_use: set[str]) -> None:
    """Deletes networks of sets so old that no service starts replicas with them any more."""
    long_ago = time.time() - KEPT_DAYS * 86400
    for file in folder.glob("*.onnx"):
        if str(file) not in in_use and file.stat().st_mtime < long_ago:
            file.unlink()


def _candidates(
    config: ExportEngineConfig, writer: NetworkWriter | None
) -> tuple[list[Candidate], Callable[[list[Candidate]], list[Candidate]]]:
    """What to try, and what to try once more where int8 is refused."""
    for reason in unavailable_engines().values():
        say(f"{reason}: not tried")
    found = candidates_for(None, BUCKETS)
    if writer is None:
        say("no data set given: nothing shows what lower precision would cost, so float32 engines only are tried")
        return [candidate for candidate in found if candidate.precision == "fp32"], lambda refused: []
    if float16_has_use():
        found += writer.float16()
    if config.int8 is not None:
        found += writer.int8(config.int8)

    def better_try(refused: list[Candidate]) -> list[Candidate]:
        if config.better_int8 is None:
            return []
        engines = {(candidate.choice["engine"], repr(candidate.choice["options"])) for candidate in refused}
        again = writer.int8(config.better_int8, BETTER_INT8, tuple(engine for engine, _ in engines))
        return [c for c in again if (c.choice["engine"], repr(c.choice["options"])) in engines]

    return found, better_try


def write_table(engine_set: EngineSet, path: Path) -> None:
    """The engine set's table as CSV."""
    rows = engine_set.table()
    with replacing(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def _publish(
    config: ExportEngineConfig, found: ModelVersion, engine_set: EngineSet, folder: Path, writer: NetworkWriter | None
) -> tuple[EngineSet, Path]:
    """Keeps the set with its table and, in MLflow, also the chosen networks, where every replica can fetch them."""
    if writer is not None:
        engine_set = writer.keep(engine_set, folder)
    registry = Registry(config.tracking_uri, config.model_name, config.artifact_root) if found.version else None
    place = f"engine_sets/{engine_set.device}"
    local = set(engine_set.network_uris(chosen=False))
    if registry is not None:
        copies = {uri: registry.log_artifact_file(found, uri, place) for uri in engine_set.network_uris(chosen=True)}
        engine_set = engine_set.with_networks_at(copies)
    table = folder / "engines.csv"
    write_table(engine_set, table)
    earlier = _networks_before(config, engine_set)
    with folder_lock(folder):
        path = engine_set.save(config.engine_sets)
    if registry is not None:
        registry.log_artifact_file(found, path, "engine_sets")
        registry.log_artifact_file(found, table, place)
    clear_networks(folder, local | earlier)
    return engine_set, path


def _networks_before(config: ExportEngineConfig, engine_set: EngineSet) -> set[str]:
    try:
        before = find_engine_set(config.engine_sets, engine_set.bundle_digest, engine_set.device)
    except ValueError as error:
        say(f"{error}: replaced")
        return set()
    return set() if before is None else set(before.network_uris(chosen=True))


def run(config: ExportEngineConfig) -> dict[str, Any]:
    found = find_model(config.model, config.tracking_uri, config.model_name, config.artifact_root)
    bundle = load_bundle(found.uri, found.digest)
    if "image" not in bundle.manifest.modalities:
        raise ValueError(f"bundle {bundle.manifest.name!r} has no image model")
    folder = networks_folder(config.engine_sets, bundle.digest, device_key())
    folder.mkdir(parents=True, exist_ok=True)
    lesions, writer = None, None
    with ExitStack() as stack:
        if config.dataset is not None:
            version = open_dataset(config.dataset)
            lesions = gate_lesions(version, bundle, config.lesions, config.seed)
            say(f"comparing engines on {len(lesions.images)} lesions, {int(lesions.malignant.sum())} of them malignant")
            writer = NetworkWriter(bundle, version, stack.enter_context(unfinished_folder(folder)), config.seed)
        candidates, better_try = _candidates(config, writer)
        engine_set = measure_candidates(
            bundle,
            candidates,
            lesions,
            rounds=config.rounds,
            limits=config.limits,
            objective=config.objective,
            better_try=better_try,
            not_made=() if writer is None else writer.not_made,
            say=say,
            enough_s=config.enough_s,
        )
        engine_set, path = _publish(config, found, engine_set, folder, writer)
    for report in engine_set.candidates:
        timings = ", ".join(f"{ms:.2f} at {bucket}" for bucket, ms in report.ms_per_image.items())
        say(f"{report.candidate.name}: {timings + ' (ms per image at batch size)' if timings else report.reason}")
    return {
        "model_version": found.version or None,
        "digest": bundle.digest,
        "device": engine_set.device,
        # Raises when every candidate was refused, after the set was kept: the promotion gate reads it.
        "engine_choice": engine_set.choice,
        "choice": engine_set.summary,
        "chosen": engine_set.chosen,
        "candidates": engine_set.table(),
        "engine_set": str(path),
    }


if __name__ == "__main__":
    run_job("export_engine", ExportEngineConfig, run, __doc__)
