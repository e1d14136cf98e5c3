"""check_drift sends its alarms by itself, once, and not what they repeat."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from ray_jobs.check_drift import run
from ray_jobs.deploy_service import DeployServiceConfig, serve_settings
from tests.test_ray_jobs_check_drift import FIRST_DAY, config, home, one_model, open_rows
from tests.webhook_receiver import webhook_receiver

pytestmark = pytest.mark.slow

__all__ = ["home", "one_model"]

SHIFTED = FIRST_DAY + timedelta(days=1)


@pytest.fixture
def copy(home, one_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    return Path(shutil.copytree(home, tmp_path / "copy"))


def alarms(receiver, **values):
    return {"channels": [{"name": "ops", "url": receiver.url, "secret_env": "SECRET"}], **values}


def test_the_alarm_of_a_drifted_day_is_sent_once_without_a_service(copy):
    with webhook_receiver() as receiver:
        first = run(config(copy, start=SHIFTED, end=SHIFTED, alarms=alarms(receiver)))
        assert first["alarms_delivered"] == {"sent": 1}
        again = run(config(copy, start=SHIFTED, end=SHIFTED, alarms=alarms(receiver)))
        assert again["alarms_delivered"] == {}
        (request,) = receiver.received
        (told,) = request.content["data"]["alarms"]
        assert told["detail"]["window"] == "2026-03-02" and told["detail"]["drifted"] == first["drifted"]


def test_a_check_without_its_receiver_ends_well_and_the_next_one_sends(copy):
    with webhook_receiver(*[500] * 9) as receiver:
        values = {"start": SHIFTED, "end": SHIFTED}
        result = run(config(copy, **values, alarms=alarms(receiver, deliver_for_s=0, max_attempts=9)))
        assert result["alarm"] is True and result["alarms_delivered"] == {"pending": 1}


def test_the_cool_down_of_the_config_counts(copy):
    """The same day again under another window's name: it says nothing new."""
    with webhook_receiver() as receiver:
        run(config(copy, start=SHIFTED, end=SHIFTED, alarms=alarms(receiver)))
        moments = {"start": f"{SHIFTED}T00:00:00Z", "end": f"{SHIFTED}T23:59:59Z"}
        run(config(copy, **moments, alarms=alarms(receiver)))
        _, (quiet, heard) = open_rows(copy)
        assert quiet["quieted_by"] == heard["id"] and len(receiver.received) == 1
        later = {"start": f"{SHIFTED}T00:00:00Z", "end": f"{SHIFTED}T23:59:58Z"}
        run(config(copy, **later, alarms=alarms(receiver, cool_down_h=0)))
        assert len(receiver.received) == 2


def test_the_services_channels_reach_its_replicas(tmp_path):
    channel = {"name": "ops", "url": "https://hooks.example/a", "secret_env": "SECRET"}
    deploy = DeployServiceConfig(alarms={"channels": [channel], "message_gap_s": 7})
    settings = serve_settings(deploy, tmp_path)
    assert settings.alarms == deploy.alarms
    assert type(settings).model_validate(settings.model_dump()).alarms.channels[0].url == channel["url"]
