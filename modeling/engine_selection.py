"""Which engine runs a bundle best on this device: candidates must be the same model, then are timed side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from modeling.bundle import Bundle
from modeling.engine_interface import Engine
from modeling.engine_parity import (
    LesionParity,
    Lesions,
    LesionScores,
    ParityLimits,
    compare_on_lesions,
    differences,
    lesion_differences,
    score_lesions,
)
from modeling.engine_set import Candidate, CandidateReport, EngineSet, Objective, device_key, num_cores
from modeling.engine_timing import BUCKETS, time_engines
from modeling.engines import create_engine
from modeling.recorded_answers import measure_parity
from modeling.steady_line import steadily


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Judge:
    """Starts candidates of one bundle and says which of them are still the same model.

    Float32 engines are held to torch's recorded answers; engines of any precision to the float32 network's answers on
    real lesions, where there are any. Without lesions no reduced precision passes: nothing would show what it costs.
    """

    def __init__(
        self,
        bundle: Bundle,
        lesions: Lesions | None,
        limits: ParityLimits,
        buckets: Sequence[int] = BUCKETS,
        say: Callable[[str], None] = lambda message: None,
    ):
        self.engines: dict[str, list[Engine]] = {}
        self.reports: list[CandidateReport] = []
        self._bundle, self._lesions, self._limits, self._buckets, self._say = bundle, lesions, limits, buckets, say
        self._reference: LesionScores | None = None
        self._known: dict[tuple, LesionParity] = {}

    def admit(self, candidate: Candidate) -> CandidateReport:
        """Starts and judges a candidate; those that pass are in `engines`, each as often as it has slots."""
        try:
            engines = [create_engine(self._bundle, candidate.choice)]
            report = self._judge(candidate, engines[0])
            if report.passed:
                engines += [create_engine(self._bundle, candidate.choice) for _ in range(candidate.slots - 1)]
        except Exception as error:  # whatever an engine's library raises refuses this candidate, not the others
            engines, report = [], CandidateReport(candidate=candidate, passed=False, reason=_line(error))
        self._say(f"{candidate.name}: " + ("the same model" if report.passed else f"refused: {report.reason}"))
        self.reports.append(report)
        if report.passed:
            self.engines[candidate.name] = engines
        return report

    def _judge(self, candidate: Candidate, engine: Engine) -> CandidateReport:
        float32 = candidate.precision == "fp32"
        parity = measure_parity(engine, self._bundle.parity(), self._buckets)
        reasons = differences(parity, self._limits, float32)
        on_lesions = None
        if self._lesions is not None and not reasons:
            on_lesions = self._on_lesions(candidate, engine, self._lesions)
            reasons = lesion_differences(on_lesions, self._limits, float32)
        elif not float32 and not reasons:
            reasons = ["no lesions of a gate split to compare it on"]
        return CandidateReport(
            candidate=candidate, passed=not reasons, reason="; ".join(reasons), parity=parity, lesions=on_lesions
        )

    def _on_lesions(self, candidate: Candidate, engine: Engine, lesions: Lesions) -> LesionParity:
        # The number of threads changes the order of sums, which the recorded pictures bound.
        options = {name: value for name, value in candidate.choice.get("options", {}).items() if name != "threads"}
        family = (candidate.choice["engine"], candidate.precision, repr(options), repr(candidate.choice.get("network")))
        if family not in self._known:
            reference = self._float32_scores(lesions)
            if family[:2] == ("onnxruntime", "fp32") and options.get("provider") == "cpu":
                scores = reference
            else:
                scores = score_lesions(engine, self._bundle, lesions, self._progress(candidate.name, lesions))
            self._known[family] = compare_on_lesions(self._bundle, lesions, scores, reference)
        return self._known[family]

    def _float32_scores(self, lesions: Lesions) -> LesionScores:
        if self._reference is None:
            options = {"threads": min(2, num_cores()), "provider": "cpu"}
            engine = create_engine(self._bundle, {"engine": "onnxruntime", "options": options})
            # The reference itself must be torch's network: an engine can agree with a broken file.
            parity = measure_parity(engine, self._bundle.parity(), self._buckets)
            if reasons := differences(parity, self._limits, float32=True):
                raise ValueError(f"the float32 network is not torch's: {'; '.join(reasons)}")
            self._reference = score_lesions(engine, self._bundle, lesions, self._progress("float32", lesions))
        return self._reference

    def _progress(self, name: str, lesions: Lesions) -> Callable[[int], None]:
        return steadily(self._say, f"{name}: lesions", len(lesions.images))


def choose(reports: Sequence[CandidateReport], buckets: Sequence[int], objective: Objective) -> dict[int, str]:
    """The best passed candidate per bucket: most images a second from the whole device, or the shortest run.

    On two cores, two replicas of one thread may serve more than one replica of two threads, although the latter
    answers a single request sooner.
    """
    passed = [report for report in reports if report.passed]

    def cost(report: CandidateReport, bucket: int) -> float:
        return -report.images_per_second[bucket] if objective == "throughput" else report.ms_per_image[bucket]

    return {bucket: min(passed, key=lambda r: cost(r, bucket)).candidate.name for bucket in buckets} if passed else {}


def measure_candidates(
    bundle: Bundle,
    candidates: Sequence[Candidate],
    lesions: Lesions | None = None,
    buckets: Sequence[int] = BUCKETS,
    rounds: int = 7,
    limits: ParityLimits | None = None,
    objective: Objective = "throughput",
    better_try: Callable[[list[Candidate]], Sequence[Candidate]] = lambda refused: (),
    not_made: Sequence[CandidateReport] = (),
    say: Callable[[str], None] = lambda message: None,
    enough_s: float = math.inf,
) -> EngineSet:
    """Starts, judges and times every candidate on this device.

    Args:
        lesions: of the gate split; None: float32 engines only can pass.
        buckets: batch sizes to time and choose for.
        rounds: alternating rounds; the median counts.
        enough_s: as `time_engines` takes it.
        better_try: called once with the int8 candidates that lesions spoke against, if any; gives others to try.
        not_made: candidates whose network could not be made, for the record.
        say: receives one progress line per candidate.
    """
    limits = limits or ParityLimits()
    judge = Judge(bundle, lesions, limits, buckets, say)
    for candidate in candidates:
        judge.admit(candidate)
    # One that does not even run would not run any better calibrated otherwise.
    refused = [r.candidate for r in judge.reports if not r.passed and r.lesions and r.candidate.precision == "int8"]
    for candidate in better_try(refused) if refused else ():
        judge.admit(candidate)
    reports = _timed(judge, bundle, buckets, rounds, say, enough_s) + list(not_made)
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


def _timed(
    judge: Judge, bundle: Bundle, buckets: Sequence[int], rounds: int, say: Callable[[str], None], enough_s: float
) -> list[CandidateReport]:
    """The judge's reports with the timings of what passed."""
    timings = time_engines(judge.engines, bundle.parity()["images"], buckets, rounds, say, enough_s)
    columns = {
        name: {
            "ms_per_image": {bucket: timing.ms_per_image for bucket, timing in by_bucket.items()},
            "images_per_second": {bucket: timing.images_per_second for bucket, timing in by_bucket.items()},
        }
        for name, by_bucket in timings.items()
    }
    return [report.model_copy(update=columns.get(report.candidate.name, {})) for report in judge.reports]
