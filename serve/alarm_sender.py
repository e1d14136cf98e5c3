"""Sends alarms from the drift logger, in a thread of its own: commits never wait for a receiver."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from monitoring.alarm_channels import ServiceAlarmSettings
from monitoring.alarm_delivery import AlarmDelivery
from monitoring.prediction_log import PredictionLog

logger = logging.getLogger("ray.serve")


class AlarmSender:
    """Sends from `start` to `stop`: at once, then every `interval_s`. Nothing to do without channels.

    Args:
        wait: waits so many seconds, or until `stop`; True if it was that.
    """

    def __init__(self, log: PredictionLog, settings: ServiceAlarmSettings, wait: Callable[[float], bool] | None = None):
        self._log = log
        self._settings = settings
        self._stopping = threading.Event()
        self._wait = wait or self._stopping.wait
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins, once."""
        if self._thread is None and self._settings.channels:
            # A daemon: a process that ends must not wait for a receiver; what it claimed is sent after the lease.
            self._thread = threading.Thread(target=self._run, name="alarms", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends it after the pass that it is at; returns at once."""
        self._stopping.set()

    def _run(self) -> None:
        # httpx writes a line with the URL, which may be a secret, for each request.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        delivery, failing = None, False
        while not self._stopping.is_set():
            try:
                # The store is opened on first use, and may be away.
                delivery = delivery or AlarmDelivery(
                    self._log.store, self._settings, self._settings.message_gap_s, log=logger
                )
                sent = delivery.deliver()
                failing = False
                if sent:
                    logger.info("alarms: %s", ", ".join(f"{number} {state}" for state, number in sorted(sent.items())))
            except Exception as error:
                # Once, not at every look at a database that is away.
                if not failing:
                    logger.error("alarms are not sent, which is tried every %g s: %r", self._settings.interval_s, error)
                failing = True
            if self._wait(self._settings.interval_s):
                return
