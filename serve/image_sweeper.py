"""Sweeps the image files from time to time, in a thread of its own; see `store.image_sweep`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from monitoring.prediction_log import PredictionLog
from serve.settings import DriftLoggerSettings
from store.image_sweep import sweep_images

logger = logging.getLogger("ray.serve")

# After every few hundred files: a sweep has time, and the commits of the same process have not.
_PAUSE_S = 0.02


class ImageSweeper:
    """Sweeps from `start` to `stop`: at once, then every `sweep_interval_s`. Nothing to do for images in a bucket.

    Args:
        wait: waits so many seconds, or until `stop`; True if it was that.
    """

    def __init__(self, log: PredictionLog, settings: DriftLoggerSettings, wait: Callable[[float], bool] | None = None):
        self._log = log
        self._interval_s = settings.sweep_interval_s
        self._min_age_s = settings.sweep_min_age_s
        self._stopping = threading.Event()
        self._wait = wait or self._stopping.wait
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins, once."""
        if self._thread is None and self._interval_s is not None and self._log.image_files.local:
            # A daemon: a process that ends must not wait for a disk or a database that hangs.
            self._thread = threading.Thread(target=self._run, args=(self._interval_s,), name="sweep", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends it after the files that it is at; returns at once."""
        self._stopping.set()

    def _run(self, interval_s: float) -> None:
        while not self._stopping.is_set():
            self._sweep()
            if self._wait(interval_s):
                return

    def _sweep(self) -> None:
        start = time.monotonic()
        try:
            sweep = sweep_images(self._log.store, self._log.image_files, self._min_age_s, self._pause)
        except Exception as error:
            logger.error("images are not swept, which is tried again in %g s: %r", self._interval_s, error)
            return
        logger.log(
            logging.ERROR if sweep.failures else logging.INFO,
            "swept images in %.1f s: of %d older than %g s, %d that no record names were removed, and %d unfinished "
            "files; failures: %d%s",
            time.monotonic() - start,
            sweep.looked_at,
            self._min_age_s,
            sweep.images,
            sweep.unfinished,
            sweep.failures,
            f", first {sweep.first_failure}" if sweep.failures else "",
        )

    def _pause(self) -> bool:
        return self._stopping.wait(_PAUSE_S)
