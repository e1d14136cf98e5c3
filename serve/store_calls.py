"""How the service uses the store: in threads of the caller's own, with 503 while it does not answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from monitoring.prediction_log import PredictionLog
from serve.errors import unavailable
from store.database import StoreUnavailableError

logger = logging.getLogger("ray.serve")

Result = TypeVar("Result")

# As long as a prediction may take. A database that hangs lets go of each thread earlier (see `store.connection`), but
# not of those that wait for a thread.
_TIMEOUT_S = 30.0


class StoreCalls:
    """Calls functions of the store, which is opened on first use.

    Each has threads of its own: calls of one kind that hang hold up none of another.

    Args:
        retry_after_s: what a 503 tells the client.
        name: of the threads.
        threads: calls at a time; the others wait.
        timeout_s: after which a call is answered with 503, also one that has no thread yet. A call that has one goes
            on: its effect may still come, so whatever is called must bear to be called again.
    """

    def __init__(
        self, log: PredictionLog, retry_after_s: int, name: str, threads: int = 4, timeout_s: float = _TIMEOUT_S
    ):
        self._log = log
        self._retry_after_s = retry_after_s
        self._name = name
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def __call__(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """`call(store, *arguments)` in a thread.

        Raises:
            ApiError: 503 when the database, or the image store, does not answer.
        """

        def work() -> Result:
            return call(self._log.store, *arguments)

        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except (StoreUnavailableError, OSError) as error:
            reason = f"no answer in {self._timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            logger.error("the store does not answer (%s): %s", self._name, reason)
            detail = "the store does not answer; send the same request again"
            raise unavailable(detail, self._retry_after_s) from error
