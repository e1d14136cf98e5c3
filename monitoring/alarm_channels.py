"""Where alarms are sent: the channels of a config, and how long each is tried."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from store.alarm_deliveries import Subscription
from store.alarm_topics import COOL_DOWN_H, HOUR_US


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")


def check_url(url: str, allow_http: bool) -> str:
    """The URL, if alarms may go there.

    Raises:
        ValueError: neither https nor http to this machine, no host, or with a password in it; without the URL, whose
            path may be a secret.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"the URL of a webhook is none: {error}") from None
    if parts.scheme not in ("http", "https") or not host or any(not char.isprintable() or char == " " for char in url):
        raise ValueError("the URL of a webhook is none; expected https://HOST/...")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL of a webhook holds a password; give the whole URL in an environment variable's name")
    if parts.scheme == "http" and not (allow_http or _loopback(host)):
        raise ValueError(f"the URL of a webhook is http://{host}/...; expected https, or allow_http: true")
    return url


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class AlarmChannel(_Settings):
    """A receiver of alarms, by HTTP POST. Its name is its identity: under another it gets recent alarms again.

    `json` is a signed message for programs (Standard Webhooks); `text` is {"text": ...}, which chat services take.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    url: str | None = None
    url_env: str | None = Field(None, description="environment variable with the URL, where the URL is the secret")
    secret_env: str | None = Field(None, description="environment variable with the signing secret, whsec_...")
    kinds: list[str] | None = Field(None, description="kinds of alarms; null: all")
    min_severity: Literal["info", "warning", "critical"] = "info"
    format: Literal["json", "text"] = "json"
    allow_http: bool = Field(False, description="let a URL be http:// that is not this machine's")

    @model_validator(mode="after")
    def _complete(self) -> AlarmChannel:
        if (self.url is None) == (self.url_env is None):
            raise ValueError(f"channel {self.name}: expected one of url and url_env")
        if self.url is not None:
            check_url(self.url, self.allow_http)
        if self.format == "json" and self.secret_env is None:
            raise ValueError(f"channel {self.name}: format json is signed; expected secret_env")
        return self

    @property
    def subscription(self) -> Subscription:
        return Subscription(self.name, None if self.kinds is None else tuple(self.kinds), self.min_severity)

    def missing_variables(self, environment: Mapping[str, str] = os.environ) -> list[str]:
        """Environment variables that it names and that are not set."""
        return [name for name in (self.url_env, self.secret_env) if name is not None and not environment.get(name)]


class AlarmDeliverySettings(_Settings):
    """The channels, and when a message to one is given up: after so many attempts, or at an age."""

    channels: list[AlarmChannel] = []
    timeout_s: float = Field(10.0, gt=0, le=120, description="for one attempt, all of it")
    max_attempts: int = Field(30, ge=1, le=1000, description="10 s apart, then twice as long each, up to an hour")
    max_age_h: float = Field(72.0, gt=0, le=8760, description="older alarms are not sent any more")

    @model_validator(mode="after")
    def _named_once(self) -> AlarmDeliverySettings:
        names = [channel.name for channel in self.channels]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"channels: {', '.join(twice)} is there twice; names are unique")
        return self

    @property
    def max_age_us(self) -> int:
        return round(self.max_age_h * HOUR_US)


class ServiceAlarmSettings(AlarmDeliverySettings):
    """How the running service sends alarms."""

    interval_s: float = Field(5.0, gt=0, le=3600, description="between looks for alarms to send")
    message_gap_s: float = Field(
        60.0, ge=0, le=86_400, description="after a message, the channel's next one waits so long and has all till then"
    )


class JobAlarmSettings(AlarmDeliverySettings):
    """How a job raises alarms, and sends what waits at its end."""

    cool_down_h: float = Field(
        COOL_DOWN_H, ge=0, le=8760, description="how long an alarm quiets those of its topic that say nothing new"
    )
    deliver_for_s: float = Field(30.0, ge=0, le=600, description="longest wait for receivers; the rest goes next time")
