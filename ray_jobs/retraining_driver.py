"""Works through the stages of one request to train, so that a driver that is killed anywhere is followed by one that
goes on: each stage's result is in the store before the next begins."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from store.database import Store, StoreUnavailableError
from store.retraining_queue import (
    RetrainClaim,
    RetrainTakenOverError,
    begin_stage,
    fail_retraining,
    finish_retraining,
    finish_stage,
    renew_lease,
)

Stage = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Results of the stages before -> this stage's result. A `model_version` in it is the request's candidate. May be
called again after it was cut off anywhere."""


def interrupt_main_thread() -> None:
    """As Ctrl-C does. `_thread.interrupt_main` only sets a flag, which a waiting thread sees after its wait."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


class StageFailedError(RuntimeError):
    """A stage failed, and the request with it.

    Attributes:
        stage: its name.
        by_user: whether it was a mistake in config or data, which needs no traceback.
    """

    def __init__(self, request_id: str, stage: str, reason: str, by_user: bool):
        super().__init__(f"retraining {request_id}: stage {stage} failed: {reason}")
        self.stage, self.by_user = stage, by_user


class LeaseKeeper:
    """Renews a claim's lease in a thread while the block runs. A driver that has lost it is interrupted as by Ctrl-C,
    which ends a training cleanly, and the block then raises RetrainTakenOverError.

    Args:
        lease_s: a quarter of it passes between renewals.
        interrupt: how the thread that runs the block is interrupted; by default it is the main thread.
    """

    def __init__(
        self,
        store: Store,
        claim: RetrainClaim,
        lease_s: float,
        say: Callable[[str], None],
        interrupt: Callable[[], None] = interrupt_main_thread,
    ):
        self._store, self._claim, self._lease_s = store, claim, lease_s
        self._say, self._interrupt = say, interrupt
        self._stop = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._keep, name="retrain-lease", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        on_main = threading.current_thread() is threading.main_thread()
        if on_main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # A shell starts what runs in the background so, and an ignored signal wakes nobody.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._stop.set()
            self._thread.join()
        except KeyboardInterrupt:
            # Ours came when the block was at its end already.
            if self._lost is None:
                raise
        if self._lost is not None and not isinstance(error, RetrainTakenOverError):
            raise RetrainTakenOverError(self._lost) from error

    def _keep(self) -> None:
        until = time.monotonic() + self._lease_s
        while not self._stop.wait(self._lease_s / 4):
            begun = time.monotonic()
            try:
                renew_lease(self._store, self._claim, int(self._lease_s * 1e6))
                until = begun + self._lease_s
            except RetrainTakenOverError as error:
                self._lost = str(error)
            except StoreUnavailableError as error:
                self._say(f"retraining {self._claim.id}: its lease was not renewed: {error}")
                if time.monotonic() >= until:
                    # Another may have it by now.
                    self._lost = f"retraining {self._claim.id}: its lease ran out while the store was away; it stops"
            if self._lost is not None:
                self._interrupt()
                return


def work(
    store: Store,
    claim: RetrainClaim,
    stages: Mapping[str, Stage],
    lease_s: float,
    say: Callable[[str], None],
    interrupt: Callable[[], None] = interrupt_main_thread,
) -> RetrainClaim:
    """Runs the stages that no earlier driver has finished, in order, and ends the request.

    Args:
        stages: by name.
        lease_s, interrupt: see `LeaseKeeper`.

    Raises:
        StageFailedError: the request is failed, with the stage and the reason in the store.
        RetrainTakenOverError: another driver has the request; nothing more is written.
        StoreUnavailableError: the store is away: the request stays as it is, and the next driver goes on with it.
    """
    with LeaseKeeper(store, claim, lease_s, say, interrupt):
        for number, (name, stage) in enumerate(stages.items(), 1):
            where = f"retraining {claim.id[:8]}, stage {number}/{len(stages)} {name}"
            if name in claim.finished:
                say(f"{where}: finished by an earlier attempt")
                continue
            begin_stage(store, claim, name)
            say(f"{where} (attempt {claim.attempt})")
            try:
                result = json_value(stage(claim.finished))
            except (StoreUnavailableError, RetrainTakenOverError):
                raise
            except Exception as error:
                if isinstance(error.__cause__, StoreUnavailableError):
                    raise error.__cause__ from None
                reason = " ".join(str(error).split()) or type(error).__name__
                fail_retraining(store, claim, name, reason)
                by_user = isinstance(error, ValueError | FileNotFoundError)
                raise StageFailedError(claim.id, name, reason, by_user) from error
            claim = finish_stage(store, claim, name, result, result.get("model_version"))
        finish_retraining(store, claim)
    say(f"retraining {claim.id[:8]}: done")
    return claim


def json_value(value: Any) -> Any:
    """The value as a JSON column takes it: NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(name): json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
