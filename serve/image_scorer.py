"""The image node: resized pictures in, class log-probabilities and a small projection of the embedding out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import serve

from modeling.bundle import load_bundle
from modeling.engines import start_engine
from serve.metrics import SCORER_BUSY_SECONDS, SCORER_PICTURES, ModelInfo, Recorder, replica_metrics
from serve.model_slot import HoldsModel, ModelSlot
from serve.private_ports import listen_on_node_address
from serve.request_ids import show_ids_in_log, watched_call
from serve.sampling import Sampler
from serve.settings import ModelReference, ScorerSettings

# More batches than ever wait.
_MANY = 1024


@dataclass(frozen=True)
class ImageScores:
    """What the network says of N pictures, and which model said it.

    Attributes:
        digest: the bundle's digest.
        log_probabilities: float32 (N, K), log softmax of the logits; uncalibrated, training prior.
        projections: float32 (N, 64), what the log keeps of the embedding.
        distances: float32 (N,), of the embeddings from those of training; None where the bundle has no abstention rule.
    """

    digest: str
    log_probabilities: np.ndarray
    projections: np.ndarray
    distances: np.ndarray | None = None

    def __getitem__(self, rows: slice) -> ImageScores:
        distances = None if self.distances is None else self.distances[rows]
        return ImageScores(self.digest, self.log_probabilities[rows], self.projections[rows], distances)


@dataclass(frozen=True)
class ActivationMap:
    """Where the network sees the classes of one picture.

    Attributes:
        digest: the bundle's digest.
        maps: class-activation maps, float32 (K, h, w); their means plus the head's bias are the logits.
        logits: float32 (K,).
        prior: class frequencies that the network was trained at, float64 (K,).
        distances: as in `ImageScores`, float32 (1,) or None.
    """

    digest: str
    maps: np.ndarray
    logits: np.ndarray
    prior: np.ndarray
    distances: np.ndarray | None


class ImageScorerLogic:
    """One verified bundle's engine, warm. `score` may be called from several threads."""

    def __init__(self, model: ModelReference, max_batch_size: int):
        bundle = load_bundle(model.bundle_uri, model.sha256)
        self.digest = bundle.digest
        self.input_size = bundle.manifest.input_size
        batches = sorted({1, max_batch_size})
        self.engine, self.engine_fallback = start_engine(bundle, model.engine, batches)
        self._matrix, self._mean = bundle.projection()
        rule = bundle.abstention()
        self._distance = None if rule is None else rule.distance
        self._max_batch_size = max_batch_size
        self._prior = np.array(bundle.manifest.sampling_prior, np.float64)

    def score(self, images: np.ndarray) -> ImageScores:
        """Scores uint8 (N, S, S, 3), at most `max_batch_size` at a time, so that memory stays bounded."""
        log_probabilities, projections, distances = [], [], []
        for start in range(0, len(images), self._max_batch_size):
            output = self.engine.run(images[start : start + self._max_batch_size])
            shifted = output.logits - output.logits.max(axis=1, keepdims=True)
            log_probabilities.append(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
            projections.append((output.embedding - self._mean) @ self._matrix)
            if self._distance is not None:
                distances.append(self._distance(output.embedding))
        return ImageScores(
            self.digest,
            np.concatenate(log_probabilities).astype(np.float32),
            np.concatenate(projections).astype(np.float32),
            np.concatenate(distances) if distances else None,
        )

    def activation_map(self, image: np.ndarray) -> ActivationMap:
        """Maps of one picture, uint8 (1, S, S, 3)."""
        output = self.engine.run(image, with_cam=True)
        assert output.cam is not None, "every engine gives the maps it is asked for"
        distances = None if self._distance is None else self._distance(output.embedding)
        return ActivationMap(self.digest, output.cam[0], output.logits[0], self._prior, distances)

    def fits(self, images: np.ndarray) -> bool:
        """Whether these (N, H, W, 3) have the size that the network takes."""
        return images.shape[1:] == (self.input_size, self.input_size, 3)

    def describe(self) -> dict[str, Any]:
        return {"digest": self.digest, "engine": self.engine.name, "engine_fallback": self.engine_fallback}


@dataclass
class ScoreCall:
    """Pictures of one or several requests, uint8 (N, S, S, 3), and when the last of their callers gives up.

    `deadline`: `time.monotonic()` of this process. `gone`: nobody waits for it any more.
    """

    images: np.ndarray
    deadline: float
    gone: bool = False

    def is_wanted(self, now: float) -> bool:
        return not self.gone and self.deadline > now


def _num_images(calls: list[ScoreCall]) -> int:
    return sum(len(call.images) for call in calls)


class ImageScorer(HoldsModel):
    """Deployment around `ImageScorerLogic`. Calls of several ingress replicas that arrive together run as one batch.

    A call whose pictures do not fit the loaded model's input gets None: the caller sees another model's digest, or
    none, while a new model is rolled out, and asks again. So does one whose callers gave up while it waited.
    """

    def __init__(self, settings: dict[str, Any], metrics: Recorder | None = None):
        self._settings = ScorerSettings.model_validate(settings)
        self._metrics = metrics or replica_metrics()
        self._model_info = ModelInfo(self._metrics, "ImageScorer")
        self._sampler = Sampler(self._metrics)
        show_ids_in_log()
        listen_on_node_address()
        batch = self._settings.max_batch_size
        self._slot = ModelSlot(lambda model: ImageScorerLogic(model, batch))
        runs = self._settings.max_concurrent_batches
        self._threads = ThreadPoolExecutor(runs, thread_name_prefix="engine")
        self._room = asyncio.Semaphore(runs)
        self._run.set_max_batch_size(self._settings.max_batch_size)
        self._run.set_batch_wait_timeout_s(self._settings.batch_wait_timeout_s)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serves the bundle of a `ModelReference`, loaded and warmed; see `ModelSlot.use`."""
        self._sampler.start()
        logic = await self._slot.use(config)
        self._model_info.holds(self._slot.version, logic.digest)

    async def score(
        self, images: np.ndarray, time_left_s: float, request_ids: tuple[str, ...] = ()
    ) -> ImageScores | None:
        """Scores uint8 (N, S, S, 3), N <= `max_batch_size`, unless `time_left_s` is over before its turn."""
        with watched_call("score", len(images), request_ids):
            # Time that is left, not a time of day: the clocks of two nodes differ.
            call = ScoreCall(images, time.monotonic() + time_left_s)
            try:
                return await self._run(call)
            except asyncio.CancelledError:
                call.gone = True
                raise

    # Serve's own bound of batches that run is fixed when the class is made; `_room` is that of the settings.
    @serve.batch(batch_size_fn=_num_images, max_concurrent_batches=_MANY)
    async def _run(self, calls: list[ScoreCall]) -> Sequence[ImageScores | None]:
        return await self._score_together(calls)

    async def _score_together(self, calls: list[ScoreCall]) -> list[ImageScores | None]:
        answers: list[ImageScores | None] = [None] * len(calls)
        async with self._room:
            logic, now = self._slot.model, time.monotonic()
            todo = [index for index, call in enumerate(calls) if logic.fits(call.images) and call.is_wanted(now)]
            if todo:
                batch = calls[todo[0]].images if len(todo) == 1 else np.concatenate([calls[i].images for i in todo])
                run = asyncio.get_running_loop().run_in_executor
                scores = await run(self._threads, self._timed_score, logic, batch)
                start = 0
                for index in todo:
                    end = start + len(calls[index].images)
                    answers[index] = scores[start:end]
                    start = end
        return answers

    def _timed_score(self, logic: ImageScorerLogic, images: np.ndarray) -> ImageScores:
        start = time.perf_counter()
        try:
            return logic.score(images)
        finally:
            self._metrics.record(SCORER_BUSY_SECONDS, time.perf_counter() - start)
            self._metrics.record(SCORER_PICTURES, len(images))

    async def explain(self, image: np.ndarray, request_ids: tuple[str, ...] = ()) -> ActivationMap | None:
        """Maps of one picture, uint8 (1, S, S, 3); rare, so it joins no batch."""
        logic = self._slot.model
        if not logic.fits(image):
            return None
        with watched_call("explain", len(image), request_ids):
            return await asyncio.get_running_loop().run_in_executor(self._threads, logic.activation_map, image)

    async def describe(self, request_ids: tuple[str, ...] = ()) -> dict[str, Any]:
        return self._slot.model.describe()
