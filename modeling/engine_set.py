"""An engine set: what every candidate engine of one bundle did on one device, and which was chosen.

It is no part of the bundle and lies in `<root>/<bundle digest[:16]>/<device>.json`.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modeling.engine_interface import EngineUnavailableError
from modeling.engine_parity import LesionParity, ParityLimits
from modeling.recorded_answers import Parity
from modeling.tensorrt_engine import check_tensorrt

Objective = Literal["throughput", "latency"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Candidate(_Record):
    """An engine to try. `choice` is what `create_engine` takes; `slots` engines of it keep the device busy, or eight of
    its cores."""

    name: str
    choice: dict[str, Any]
    precision: str = "fp32"
    slots: int = Field(1, ge=1)


class CandidateReport(_Record):
    """What became of a candidate: `reason` is empty when it passed; `lesions` is what it did on real ones.

    Times by batch size: `ms_per_image` of one engine alone, `images_per_second` of `slots` of them side by side.
    """

    candidate: Candidate
    passed: bool
    reason: str = ""
    parity: Parity | None = None
    lesions: LesionParity | None = None
    ms_per_image: dict[int, float] = Field(default_factory=dict)
    images_per_second: dict[int, float] = Field(default_factory=dict)


class EngineSet(_Record):
    """All candidates of one bundle on one device, and the choice per batch bucket (bucket -> candidate name)."""

    schema_version: Literal[2] = 2
    bundle_digest: str
    device: str
    cores: int
    created_at: str
    objective: Objective
    limits: ParityLimits
    candidates: list[CandidateReport]
    chosen: dict[int, str]

    @property
    def passed(self) -> bool:
        """Whether some engine agrees with torch, so that the bundle can be served from this device."""
        return bool(self.chosen)

    @property
    def choice(self) -> dict[str, Any]:
        """The choice for `create_engine`; ValueError when every candidate was refused."""
        if not self.chosen:
            reasons = "; ".join(f"{report.candidate.name}: {report.reason}" for report in self.candidates)
            raise ValueError(f"no engine of bundle {self.bundle_digest[:16]} passed on {self.device}: {reasons}")
        by_name = {
            report.candidate.name: {**report.candidate.choice, "max_delta_p": report.parity.probability}
            if report.parity
            else report.candidate.choice
            for report in self.candidates
        }
        if len(set(self.chosen.values())) == 1:
            return by_name[next(iter(self.chosen.values()))]
        return {"buckets": {str(bucket): by_name[name] for bucket, name in self.chosen.items()}}

    def network_uris(self, chosen: bool) -> list[str]:
        """Where the networks of the candidates lie that some batch size runs on, or of all that passed."""
        names = set(self.chosen.values())
        networks = [
            report.candidate.choice.get("network")
            for report in self.candidates
            if (report.candidate.name in names if chosen else report.passed)
        ]
        return list(dict.fromkeys(network["uri"] for network in networks if network is not None))

    def with_networks_at(self, uris: dict[str, str]) -> EngineSet:
        """The same set with its networks' URIs replaced (old -> new)."""

        def moved(candidate: Candidate) -> Candidate:
            network = candidate.choice.get("network")
            if network is None or network["uri"] not in uris:
                return candidate
            there = {**network, "uri": uris[network["uri"]]}
            return candidate.model_copy(update={"choice": {**candidate.choice, "network": there}})

        reports = [r.model_copy(update={"candidate": moved(r.candidate)}) for r in self.candidates]
        return self.model_copy(update={"candidates": reports})

    def table(self) -> list[dict[str, Any]]:
        """A row per candidate and batch size, flat: what people compare. Refused candidates have one row, no times."""
        rows = []
        for report in self.candidates:
            lesions = report.lesions.model_dump() if report.lesions else {}
            facts = {
                "candidate": report.candidate.name,
                "precision": report.candidate.precision,
                "verdict": "passed" if report.passed else "refused",
                "reason": report.reason,
                "max_delta_p": lesions.get("probability", report.parity.probability if report.parity else None),
                **{name: lesions.get(name) for name in ("rank_correlation", "delta_auc", "delta_pauc", "n")},
            }
            for bucket, ms in report.ms_per_image.items() or [(None, None)]:
                timing = {
                    "batch": bucket,
                    "ms_per_image": ms,
                    "images_per_second": report.images_per_second.get(bucket),
                }
                chosen = bucket is not None and self.chosen.get(bucket) == report.candidate.name
                rows.append({**facts, **timing, "chosen": chosen})
        return rows

    @property
    def summary(self) -> str:
        """The choice in words: one name, or the name per batch size."""
        names = set(self.chosen.values())
        return names.pop() if len(names) == 1 else ", ".join(f"{n} up to {b}" for b, n in sorted(self.chosen.items()))

    def save(self, root: str | Path) -> Path:
        """Writes the set under `root`, replacing this device's earlier one; returns the file. One at a time: its
        temporary name is the same each time, so that a killed one leaves nothing."""
        path = engine_set_path(root, self.bundle_digest, self.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(self.model_dump_json(indent=1), encoding="utf-8")
        os.replace(partial, path)
        return path


def num_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_key() -> str:
    """A file name for this machine's processor, and its GPU where an engine can use one."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8", errors="replace"), re.M)
        processor = found.group(1) if found else processor
    names = [processor]
    if cuda_available() or tensorrt_available():
        for info in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
            found = re.search(r"^Model:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.M)
            names += [found.group(1)] if found and found.group(1) not in names else []
    return "+".join(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in names)


def cuda_available() -> bool:
    """Whether this onnxruntime was built with CUDA."""
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def tensorrt_available() -> bool:
    """Whether TensorRT engines can run here."""
    try:
        check_tensorrt()
    except EngineUnavailableError:
        return False
    return True


def engine_set_path(root: str | Path, digest: str, device: str) -> Path:
    """Where a bundle's engine set for a device lies."""
    return Path(root) / digest[:16] / f"{device}.json"


def _read(path: Path, digest: str) -> EngineSet:
    try:
        engine_set = EngineSet.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"engine set {path} is not valid; run export_engine again") from error
    if engine_set.bundle_digest != digest:
        raise ValueError(f"engine set {path} belongs to bundle {engine_set.bundle_digest}, not {digest}")
    return engine_set


def find_engine_set(root: str | Path, digest: str, device: str | None = None) -> EngineSet | None:
    """The bundle's engine set for a device (default: this one), or None where it was never measured."""
    path = engine_set_path(root, digest, device or device_key())
    return _read(path, digest) if path.exists() else None


def engine_sets(root: str | Path, digest: str) -> list[EngineSet]:
    """The bundle's engine sets, one per device, in the order of the devices' names."""
    return [_read(path, digest) for path in sorted((Path(root) / digest[:16]).glob("*.json"))]


def networks_folder(root: str | Path, digest: str, device: str) -> Path:
    """Where a bundle's networks in other precisions lie, beside the device's engine set."""
    return engine_set_path(root, digest, device).with_suffix("")
