"""The fusion node: image log-probabilities and metadata in, calibrated risk, band and threshold out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling.bundle import load_bundle
from serve.metrics import ModelInfo, Recorder, replica_metrics
from serve.model_slot import HoldsModel, ModelSlot
from serve.private_ports import listen_on_node_address
from serve.request_ids import show_ids_in_log, watched_call
from serve.sampling import Sampler
from serve.settings import ModelReference

Record = Mapping[str, Any]


@dataclass(frozen=True)
class FusedRisk:
    """One lesion's calibrated answer.

    Attributes:
        context: which model answered: "none" = image and own metadata, "image_only" = no metadata, "patient" = also
            how the lesion stands out among the patient's.
        class_probabilities: calibrated, by class name.
        risk: their sum over the malignant classes.
        band: "low", "moderate" or "high".
        threshold: the risk at and above which a lesion counts as positive.
    """

    context: str
    class_probabilities: dict[str, float]
    risk: float
    band: str
    threshold: float


@dataclass(frozen=True)
class FusedRisks:
    """Answers for N lesions, in order, and the digest of the bundle that gave them."""

    digest: str
    risks: list[FusedRisk]


def has_metadata(record: Record | None) -> bool:
    """Whether a cleaned record says anything: an empty one is scored by its picture alone."""
    return record is not None and any(value is not None for value in record.values())


class MetadataFusionLogic:
    """The context models of one verified bundle."""

    def __init__(self, model: ModelReference):
        bundle = load_bundle(model.bundle_uri, model.sha256)
        self.digest = bundle.digest
        self._task = bundle.task
        self._models = {name: bundle.contexts[name] for name in bundle.manifest.contexts}
        if "image_only" not in self._models:
            raise ValueError(f"bundle {model.bundle_uri} has no image_only context; it cannot be served")
        self._metrics = {name: bundle.metrics(name) for name in self._models}
        # The first prediction of a LightGBM booster sets it up.
        empty = dict.fromkeys(self._task.columns)
        uniform = np.full((1, self._task.num_classes), -np.log(self._task.num_classes), np.float32)
        for name in self._models:
            self._predict(name, uniform, [empty], np.array([True]))

    def context_of(self, record: Record | None) -> str:
        """ "none" where there is metadata and the bundle can use it, else "image_only"."""
        return "none" if "none" in self._models and has_metadata(record) else "image_only"

    def _predict(
        self, context: str, log_probabilities: np.ndarray, records: Sequence[Record], trusted: np.ndarray | None = None
    ) -> np.ndarray:
        columns = None
        if context != "image_only":
            columns = {name: [record.get(name) for record in records] for name in self._task.columns}
        groups = ["patient"] * len(records) if context == "patient" else None
        return self._models[context].predict(log_probabilities, columns, groups, trusted=trusted)

    def fuse(self, log_probabilities: np.ndarray, records: Sequence[Record | None]) -> FusedRisks:
        """Fuses float32 (N, K) with N cleaned records (None: no metadata given)."""
        risks: list[FusedRisk | None] = [None] * len(records)
        contexts = [self.context_of(record) for record in records]
        for context in sorted(set(contexts)):
            rows = [row for row, name in enumerate(contexts) if name == context]
            probabilities = self._predict(context, log_probabilities[rows], [records[row] or {} for row in rows])
            for row, values in zip(rows, probabilities, strict=True):
                risks[row] = self._answer(context, values)
        return FusedRisks(self.digest, [risk for risk in risks if risk is not None])

    def fits(self, log_probabilities: np.ndarray) -> bool:
        """Whether these (N, K) are of as many classes as this model has."""
        return log_probabilities.shape[1:] == (self._task.num_classes,)

    def fuse_patient(
        self, log_probabilities: np.ndarray, records: Sequence[Record | None], trusted: np.ndarray
    ) -> FusedRisks | None:
        """Fuses all lesions of one patient, float32 (N, K), each compared with the others; None without such a model.

        Args:
            trusted: bool (N,), which lesions' image scores others are compared with.
        """
        if "patient" not in self._models:
            return None
        probabilities = self._predict("patient", log_probabilities, [record or {} for record in records], trusted)
        return FusedRisks(self.digest, [self._answer("patient", values) for values in probabilities])

    def _answer(self, context: str, probabilities: np.ndarray) -> FusedRisk:
        thresholds = self._models[context].thresholds
        risk = float(probabilities[self._task.malignant_mask].sum())
        return FusedRisk(
            context=context,
            class_probabilities={
                name: float(value) for name, value in zip(self._task.classes, probabilities, strict=True)
            },
            risk=risk,
            band=thresholds.band(risk),
            threshold=float(thresholds.threshold),
        )

    def describe(self) -> dict[str, Any]:
        """Thresholds and metrics by context, for the model card."""
        return {
            "digest": self.digest,
            "contexts": {
                name: {"thresholds": model.thresholds.model_dump(mode="json"), "metrics": self._metrics[name]}
                for name, model in self._models.items()
            },
        }


class MetadataFusion(HoldsModel):
    """Deployment around `MetadataFusionLogic`."""

    def __init__(self, metrics: Recorder | None = None) -> None:
        metrics = metrics or replica_metrics()
        self._slot = ModelSlot(MetadataFusionLogic)
        self._model_info = ModelInfo(metrics, "MetadataFusion")
        self._sampler = Sampler(metrics)
        show_ids_in_log()
        listen_on_node_address()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fusion")

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serves the bundle of a `ModelReference`; see `ModelSlot.use`."""
        self._sampler.start()
        logic = await self._slot.use(config)
        self._model_info.holds(self._slot.version, logic.digest)

    async def fuse(
        self, log_probabilities: np.ndarray, records: list[Record | None], request_ids: tuple[str, ...] = ()
    ) -> FusedRisks:
        """See `MetadataFusionLogic.fuse`; no risks, beside the digest that says why, for scores of another model."""
        logic = self._slot.model
        if not logic.fits(log_probabilities):
            return FusedRisks(logic.digest, [])
        with watched_call("fuse", len(records), request_ids):
            if len(records) == 1:
                return logic.fuse(log_probabilities, records)
            run = asyncio.get_running_loop().run_in_executor
            return await run(self._thread, logic.fuse, log_probabilities, records)

    async def fuse_patient(
        self,
        log_probabilities: np.ndarray,
        records: list[Record | None],
        trusted: np.ndarray,
        request_ids: tuple[str, ...] = (),
    ) -> FusedRisks | None:
        """See `MetadataFusionLogic.fuse_patient`."""
        logic = self._slot.model
        if not logic.fits(log_probabilities):
            return FusedRisks(logic.digest, [])
        with watched_call("fuse_patient", len(records), request_ids):
            run = asyncio.get_running_loop().run_in_executor
            return await run(self._thread, logic.fuse_patient, log_probabilities, records, trusted)

    async def describe(self, request_ids: tuple[str, ...] = ()) -> dict[str, Any]:
        return self._slot.model.describe()
