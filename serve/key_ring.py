"""The live API keys of one ingress replica: read from the store in the background, looked up without waiting."""

from __future__ import annotations

import asyncio
import contextvars
import hmac
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from store.api_keys import ROLES, ApiKey, hash_key

logger = logging.getLogger("ray.serve")

# How long a replica waits for a store that does not answer before it takes requests, which then get 503.
_FIRST_READ_S = 5.0
# After it a read counts as failed, whatever its thread waits for.
_READ_S = 30.0
# Keys are found by the head of their hash, which tells nothing, and told apart by a comparison of constant time.
_HEAD = 16


class KeyRing:
    """Keys as the store had them at most `refresh_s` and the time of one query ago.

    While the store does not answer, the last known keys stay valid.

    Args:
        load: reads the live keys; called in a thread.
    """

    def __init__(self, load: Callable[[], Iterable[ApiKey]], refresh_s: float):
        self._load = load
        self._refresh_s = refresh_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keys")
        self._keys: dict[str, tuple[ApiKey, ...]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()
        self._failing = False

    @property
    def loaded(self) -> bool:
        """Whether the store was ever read; until then no key is right or wrong."""
        return self._keys is not None

    @property
    def state(self) -> str:
        """For readiness: "ok", "last known" while the store does not answer, or what is wrong."""
        if not self.loaded:
            return "never read"
        return "last known" if self._failing else "ok"

    def find(self, text: bytes) -> ApiKey | None:
        """The live key of this text."""
        digest = hash_key(text)
        for key in (self._keys or {}).get(digest[:_HEAD], ()):
            if hmac.compare_digest(key.key_hash, digest):
                return key
        return None

    def get(self, key_id: str) -> ApiKey | None:
        """The live key of this id."""
        return next((key for keys in (self._keys or {}).values() for key in keys if key.id == key_id), None)

    async def start(self) -> None:
        """Reads the keys now and every `refresh_s` on this event loop; returns after the first try."""
        if self._task is None or self._task.done():
            self._tried = asyncio.Event()
            # An empty context, so that the end of the request that came first does not cancel the task.
            self._task = asyncio.get_running_loop().create_task(self._refresh(), context=contextvars.Context())
        try:
            await asyncio.wait_for(self._tried.wait(), _FIRST_READ_S)
        except TimeoutError:
            logger.error("API keys were not read within %g s", _FIRST_READ_S)

    async def _refresh(self) -> None:
        while True:
            try:
                read = asyncio.get_running_loop().run_in_executor(self._thread, lambda: list(self._load()))
                # Not wait_for: before Python 3.12 it may swallow the end of this task.
                async with asyncio.timeout(_READ_S):
                    self._keys = _by_head(await read)
            except Exception as error:
                if not self._failing:
                    logger.error("API keys cannot be read, the last known stay valid: %r", error)
                self._failing = True
            else:
                if self._failing:
                    logger.warning("API keys are read again")
                self._failing = False
            self._tried.set()
            await asyncio.sleep(self._refresh_s)


def _by_head(keys: Iterable[ApiKey]) -> dict[str, tuple[ApiKey, ...]]:
    found: dict[str, tuple[ApiKey, ...]] = {}
    for key in keys:
        # A role that a later release knows opens nothing here.
        if key.role in ROLES:
            head = key.key_hash[:_HEAD]
            found[head] = (*found.get(head, ()), key)
    return found
