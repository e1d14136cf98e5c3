"""Which engine runs a bundle best on this device: candidates are compared with torch, then timed side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np

from modeling.bundle import Bundle
from modeling.engine_set import (
    Candidate,
    CandidateReport,
    EngineSet,
    Objective,
    Parity,
    ParityLimits,
    cuda_available,
    device_key,
    engine_sets,
    find_engine_set,
    num_cores,
)
from modeling.engines import Engine, EngineOutput, create_engine

__all__ = [
    "Candidate",
    "EngineSet",
    "ParityLimits",
    "default_candidates",
    "engine_sets",
    "find_engine_set",
    "measure_candidates",
]

BUCKETS = (1, 8, 32)


def default_candidates() -> list[Candidate]:
    """ONNX Runtime with one and two CPU threads, and on CUDA where this installation has it."""
    cores = num_cores()
    found = []
    for threads in (1, 2):
        if threads <= cores:
            choice = {"engine": "onnxruntime", "options": {"threads": threads, "provider": "cpu"}}
            found.append(Candidate(name=f"onnxruntime-cpu-{threads}", choice=choice, slots=cores // threads))
    if cuda_available():
        choice = {"engine": "onnxruntime", "options": {"threads": 1, "provider": "cuda"}}
        found.append(Candidate(name="onnxruntime-cuda", choice=choice))
    return found


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def _check_output(output: EngineOutput, rows: int, num_classes: int, embedding_dim: int) -> None:
    expected = {"logits": (rows, num_classes), "embedding": (rows, embedding_dim), "cam": (rows, num_classes)}
    for name, shape in expected.items():
        got = getattr(output, name)
        if got is None or got.ndim != (4 if name == "cam" else 2) or got.shape[:2] != shape:
            raise ValueError(f"{name} has shape {getattr(got, 'shape', None)}; expected {shape} first")
        if not np.isfinite(got).all():
            raise ValueError(f"{name} holds values that are not finite in a batch of {rows}")


def measure_parity(engine: Engine, reference: dict[str, np.ndarray], batches: Sequence[int] = BUCKETS) -> Parity:
    """Largest differences between an engine and torch's recorded answers, in batches of every given size.

    Args:
        reference: images uint8 (P, S, S, 3), logits (P, K), embedding (P, D), as `Bundle.parity` returns them.

    Raises:
        ValueError: an output of the wrong shape or with values that are not finite.
    """
    logits, embedding = reference["logits"].astype(np.float64), reference["embedding"].astype(np.float64)
    differences = []
    for batch in batches:
        # The pictures repeat where there are fewer of them than a batch holds.
        rows = np.arange(-(-len(logits) // batch) * batch) % len(logits)
        for picked in rows.reshape(-1, batch):
            output = engine.run(reference["images"][picked], with_cam=True)
            _check_output(output, batch, logits.shape[1], embedding.shape[1])
            differences.append(
                (
                    np.abs(_softmax(output.logits.astype(np.float64)) - _softmax(logits[picked])).max(),
                    np.abs(output.logits - logits[picked]).max(),
                    np.abs(output.embedding - embedding[picked]).max() / max(np.abs(embedding).max(), 1e-12),
                )
            )
    probability, logit, relative = (float(value) for value in np.max(differences, axis=0))
    return Parity(probability=probability, logit=logit, embedding=relative)


def _admit(
    bundle: Bundle, candidate: Candidate, limits: ParityLimits, buckets: Sequence[int]
) -> tuple[Engine | None, CandidateReport]:
    """Starts a candidate and compares it with torch; the engine is None where it is refused."""
    try:
        engine = create_engine(bundle, candidate.choice)
        parity = measure_parity(engine, bundle.parity(), buckets)
    except Exception as error:  # whatever an engine's library raises refuses this candidate, not the others
        return None, CandidateReport(candidate=candidate, passed=False, reason=" ".join(str(error).split()))
    over = [
        f"{name} differs by {value:.2g}, limit {getattr(limits, name):.2g}"
        for name, value in parity.model_dump().items()
        if value > getattr(limits, name)
    ]
    report = CandidateReport(candidate=candidate, passed=not over, reason="; ".join(over), parity=parity)
    return (None if over else engine), report


def time_engines(
    engines: dict[str, Engine], images: np.ndarray, buckets: Sequence[int] = BUCKETS, rounds: int = 7
) -> dict[str, dict[int, float]]:
    """Milliseconds per image by engine and batch size: medians of rounds in which the engines alternate.

    Alternating spreads a noisy neighbour over all of them; every second round runs them in reverse.
    """
    samples: dict[str, dict[int, list[float]]] = {name: {bucket: [] for bucket in buckets} for name in engines}
    for engine in engines.values():
        for bucket in buckets:
            engine.warm_up(bucket)
    for number in range(rounds):
        order = list(engines) if number % 2 == 0 else list(engines)[::-1]
        for bucket in buckets:
            batch = images[np.arange(bucket) % len(images)]
            repeats = max(1, max(buckets) // bucket)
            for name in order:
                started = time.perf_counter()
                for _ in range(repeats):
                    engines[name].run(batch)
                samples[name][bucket].append((time.perf_counter() - started) * 1000 / (repeats * bucket))
    return {
        name: {bucket: statistics.median(values) for bucket, values in by_bucket.items()}
        for name, by_bucket in samples.items()
    }


def choose(reports: Sequence[CandidateReport], buckets: Sequence[int], objective: Objective) -> dict[int, str]:
    """The best passed candidate per bucket: most images a second from the whole device, or the shortest run.

    Throughput counts every core a candidate occupies: on two cores, two replicas of one thread serve more than one
    replica of two threads, although the latter answers a single request sooner.
    """
    passed = [report for report in reports if report.passed]

    def cost(report: CandidateReport, bucket: int) -> float:
        slots = report.candidate.slots if objective == "throughput" else 1
        return report.ms_per_image[bucket] / slots

    return {bucket: min(passed, key=lambda r: cost(r, bucket)).candidate.name for bucket in buckets} if passed else {}


def measure_candidates(
    bundle: Bundle,
    candidates: Sequence[Candidate] | None = None,
    buckets: Sequence[int] = BUCKETS,
    rounds: int = 7,
    limits: ParityLimits | None = None,
    objective: Objective = "throughput",
    say: Callable[[str], None] = lambda message: None,
) -> EngineSet:
    """Starts, compares with torch and times every candidate on this device.

    Args:
        candidates: default: `default_candidates()`.
        buckets: batch sizes to time and choose for.
        rounds: alternating rounds; the median counts.
        say: receives one progress line per candidate.
    """
    limits = limits or ParityLimits()
    engines: dict[str, Engine] = {}
    reports = []
    for candidate in default_candidates() if candidates is None else candidates:
        engine, report = _admit(bundle, candidate, limits, buckets)
        say(f"{candidate.name}: " + ("agrees with torch" if report.passed else f"refused: {report.reason}"))
        reports.append(report)
        if engine is not None:
            engines[candidate.name] = engine
    timings = time_engines(engines, bundle.parity()["images"], buckets, rounds)
    reports = [report.model_copy(update={"ms_per_image": timings.get(report.candidate.name, {})}) for report in reports]
    return EngineSet(
        bundle_digest=bundle.digest,
        device=device_key(),
        cores=num_cores(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        objective=objective,
        limits=limits,
        candidates=reports,
        chosen=choose(reports, buckets, objective),
    )
