"""How routes use the store: in a thread, with 503 while it does not answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from monitoring.prediction_log import PredictionLog
from serve.errors import unavailable
from store.database import StoreUnavailableError

logger = logging.getLogger("ray.serve")

Result = TypeVar("Result")


class StoreCalls:
    """Calls functions of the store, which is opened on first use.

    Args:
        retry_after_s: what a 503 tells the client.
    """

    def __init__(self, log: PredictionLog, retry_after_s: int):
        self._log = log
        self._retry_after_s = retry_after_s

    async def __call__(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """`call(store, *arguments)` in a thread.

        Raises:
            ApiError: 503 when the database, or the image store, does not answer.
        """
        try:
            return await asyncio.to_thread(lambda: call(self._log.store, *arguments))
        except (StoreUnavailableError, OSError) as error:
            logger.error("the store does not answer: %s", error)
            raise unavailable("the store does not answer", self._retry_after_s) from error
