"""Sends alarms to their channels, at least once each: claims a message, posts it, and says in the store what came of
it. Any number of processes may do so at a time, and each may die at any point."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from monitoring.alarm_channels import AlarmChannel, AlarmDeliverySettings, check_url
from monitoring.alarm_messages import message_body
from monitoring.webhook import Answer, parse_secrets, post
from store.alarm_deliveries import (
    FAILED,
    PENDING,
    SENT,
    Delivery,
    back_off,
    claim_delivery,
    give_up,
    is_due,
    mark_sent,
    next_attempt,
)
from store.database import Store
from store.tables import now_us

logger = logging.getLogger(__name__)

_FIRST_WAIT_S = 10.0
_LONGEST_WAIT_S = 3600.0
# Above one attempt's time: the store's writes around it, and a slow name server.
_LEASE_MARGIN_S = 60.0


@dataclass(frozen=True)
class _Receiver:
    url: str
    keys: list[bytes]


class AlarmDelivery:
    """Delivers what waits in a store.

    Args:
        gap_s: after a message, a channel's next one waits so long.
        environment: where the variables of the channels are looked up.
        log: gets the lines about failures.
    """

    def __init__(
        self,
        store: Store,
        settings: AlarmDeliverySettings,
        gap_s: float = 0.0,
        environment: Mapping[str, str] = os.environ,
        log: logging.Logger = logger,
    ):
        self._store = store
        self._settings = settings
        self._gap_us = round(gap_s * 1e6)
        self._environment = environment
        self._log = log

    def deliver(self) -> Counter[str]:
        """One pass: at most one message to each channel, all at once; alarms by what became of them: `SENT`, `PENDING`
        (tried again later) or `FAILED`.

        Raises:
            StoreUnavailableError: the database does not answer. What was claimed is sent again after its lease, with
                the same id.
        """
        claimed = []
        for channel in self._settings.channels:
            receiver = self._receiver(channel)
            delivery = receiver and self._claim(channel)
            if receiver and delivery:
                claimed.append((channel, receiver, delivery))
        if not claimed:
            return Counter()
        answers = asyncio.run(self._post_all(claimed))
        outcome: Counter[str] = Counter()
        for (channel, _, delivery), answer in zip(claimed, answers, strict=True):
            outcome[self._settle(channel, delivery, answer)] += len(delivery.alarms)
        return outcome

    def deliver_for(self, seconds: float, sleep: Callable[[float], None] = time.sleep) -> Counter[str]:
        """Passes until nothing is left, or what is left is not due within the time; alarms by their last outcome."""
        end = time.monotonic() + seconds
        total: Counter[str] = Counter()
        while True:
            outcome = self.deliver()
            total.update({state: number for state, number in outcome.items() if state != PENDING})
            wait = self._wait_s()
            if wait is not None and time.monotonic() + wait <= end:
                sleep(wait)
            elif not outcome[SENT] or time.monotonic() > end:
                return total + Counter({PENDING: outcome[PENDING]})

    def _wait_s(self) -> float | None:
        """Until the first message under way is due; None where there is none that this process can send."""
        channels = [channel for channel in self._settings.channels if self._receiver(channel, quiet=True)]
        due = [next_attempt(self._store, channel.name) for channel in channels]
        return min((max(0.0, (at - now_us()) / 1e6) for at in due if at is not None), default=None)

    def _receiver(self, channel: AlarmChannel, quiet: bool = False) -> _Receiver | None:
        """Where to; None where this process was not given what it needs, which costs the message no attempt: another
        process may have it."""
        try:
            missing = channel.missing_variables(self._environment)
            if missing:
                raise ValueError(f"the environment variable {missing[0]} is not set in this process")
            url = channel.url if channel.url_env is None else self._environment[channel.url_env]
            keys = [] if channel.secret_env is None else parse_secrets(self._environment[channel.secret_env])
            return _Receiver(check_url(url or "", channel.allow_http), keys)
        except ValueError as error:
            if not quiet and is_due(self._store, channel.subscription, self._gap_us):
                self._log.error("alarms wait for channel %s: %s", channel.name, error)
            return None

    def _claim(self, channel: AlarmChannel) -> Delivery | None:
        return claim_delivery(
            self._store,
            channel.subscription,
            lease_us=round((self._settings.timeout_s + _LEASE_MARGIN_S) * 1e6),
            max_attempts=self._settings.max_attempts,
            max_age_us=self._settings.max_age_us,
            gap_us=self._gap_us,
        )

    async def _post_all(self, claimed: list[tuple[AlarmChannel, _Receiver, Delivery]]) -> list[Answer]:
        posts = [
            post(
                receiver.url,
                delivery.message_id,
                message_body(delivery, channel.format),
                receiver.keys,
                self._settings.timeout_s,
            )
            for channel, receiver, delivery in claimed
        ]
        return await asyncio.gather(*posts)

    def _settle(self, channel: AlarmChannel, delivery: Delivery, answer: Answer) -> str:
        if answer.error is None:
            mark_sent(self._store, delivery)
            return SENT
        settings, now = self._settings, now_us()
        what = f"channel {channel.name} did not take {len(delivery.alarms)} alarms ({answer.error})"
        attempt = f"attempt {delivery.attempts} of {settings.max_attempts}"
        if delivery.attempts >= settings.max_attempts or delivery.newest_us <= now - settings.max_age_us:
            give_up(self._store, delivery, answer.error)
            self._log.error("%s, %s: they are given up; see GET /v1/alarms", what, attempt)
            return FAILED
        wait_s = wait_after(delivery.attempts, answer.retry_after_s)
        back_off(self._store, delivery, now + round(wait_s * 1e6), answer.error)
        self._log.error("%s, %s; again in %.0f s", what, attempt, wait_s)
        return PENDING


def wait_after(attempts: int, retry_after_s: float | None = None) -> float:
    """Seconds to the next attempt: 10, doubled after each up to an hour, less up to a half by chance, so that senders
    do not come back all at once; no less than the receiver asked for, up to an hour."""
    longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(attempts - 1, 30))
    return max(random.uniform(0.5, 1.0) * longest, min(retry_after_s or 0.0, _LONGEST_WAIT_S))
