"""The model that a replica serves, and the next one, loaded beside it before any node switches. Without Ray.

Serve stops a replica whose `reconfigure` raises, and its successor starts with the same config: a bundle that does not
load would leave no replica at all. So a new model is tried first, and one that fails leaves the old one in place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from serve.settings import ModelReference

logger = logging.getLogger("ray.serve")

# Until when a prepared model must be taken: a deploy that was killed in between must not fill the memory for good.
PREPARED_S = 900.0

Model = TypeVar("Model")


class ModelSlot(Generic[Model]):
    """One replica's model, and the next. Calls come from one event loop.

    Args:
        load: opens a bundle, with all that can fail; called in a thread.
        prepared_s: for how long a prepared model is kept.
    """

    def __init__(self, load: Callable[[ModelReference], Model], prepared_s: float = PREPARED_S):
        self._load = load
        self._prepared_s = prepared_s
        # One bundle at a time: two deploys at once would hold three models.
        self._loading = asyncio.Lock()
        self._held: tuple[ModelReference, Model] | None = None
        self._prepared: tuple[ModelReference, Model] | None = None
        self._refused: tuple[ModelReference, str] | None = None
        self._expiry: asyncio.TimerHandle | None = None

    @property
    def model(self) -> Model:
        assert self._held is not None, "Serve calls reconfigure before the first request"
        return self._held[1]

    @property
    def version(self) -> str:
        """Of the model that is served."""
        assert self._held is not None, "Serve calls reconfigure before the first request"
        return self._held[0].version

    async def prepare(self, config: dict[str, Any]) -> str | None:
        """Loads the bundle of a `ModelReference` beside the model that is served, which goes on.

        Returns:
            Why it does not load, in one line; None when it does, and `use` takes it at once.
        """
        async with self._loading:
            reference = ModelReference.model_validate(config)
            if any(found is not None and found[0] == reference for found in (self._held, self._prepared)):
                return None
            self.drop_prepared()
            try:
                self._prepared = reference, await self._load_off_the_loop(reference)
            except Exception as error:
                logger.error("model %s is not prepared: %r", reference.version, error)
                return _reason(error)
            self._expiry = asyncio.get_running_loop().call_later(self._prepared_s, self.drop_prepared)
            return None

    def drop_prepared(self) -> None:
        """Frees what `prepare` loaded, if `use` has not taken it."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._prepared = self._expiry = None

    async def use(self, config: dict[str, Any]) -> Model:
        """Serves the model of a `ModelReference` from now on; returns the one that is served.

        That is the old one where the new one does not load; `state` says so.

        Raises:
            Exception: what loading raised in a replica that has no old one.
        """
        async with self._loading:
            reference = ModelReference.model_validate(config)
            self._refused = None
            if self._held is not None and self._held[0] == reference:
                self.drop_prepared()
                return self.model
            if self._prepared is not None and self._prepared[0] == reference:
                self._held = self._prepared
            else:
                try:
                    self._held = reference, await self._load_off_the_loop(reference)
                except Exception as error:
                    if self._held is None:
                        raise
                    logger.error("model %s is refused, the old one is kept: %r", reference.version, error)
                    self._refused = reference, _reason(error)
            self.drop_prepared()
            return self.model

    async def _load_off_the_loop(self, reference: ModelReference) -> Model:
        # Hashing a bundle, or fetching it, takes seconds in which others want their answers.
        return await asyncio.get_running_loop().run_in_executor(None, self._load, reference)

    def state(self) -> dict[str, Any]:
        """The reference that is served, and the one that was refused with the reason, each None where there is none."""
        held, refused = self._held, self._refused
        return {
            "model": None if held is None else held[0].model_dump(),
            "refused": None if refused is None else {"model": refused[0].model_dump(), "reason": refused[1]},
        }


class HoldsModel:
    """What `deploy_service` asks every deployment that holds a model."""

    _slot: ModelSlot[Any]

    async def prepare(self, config: dict[str, Any]) -> str | None:
        """See `ModelSlot.prepare`."""
        return await self._slot.prepare(config)

    async def drop_prepared(self) -> None:
        self._slot.drop_prepared()

    async def model_state(self) -> dict[str, Any]:
        return self._slot.state()


def _reason(error: Exception) -> str:
    """One line; a ValueError's own words are meant for people, others need their type beside them."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
