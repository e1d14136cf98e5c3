"""What is decoded on the event loop is small in pixels, not only in bytes."""

from __future__ import annotations

import threading

import cv2
import numpy as np
import pytest

from serve import lesion_scoring
from tests.bundle_factory import lesion_image, served_bundle
from tests.local_service import LocalService


@pytest.mark.parametrize(("large", "on_the_loop"), [(False, True), (True, False)])
def test_a_small_file_of_many_pixels_does_not_stop_the_event_loop(
    tmp_path, dermray_home, monkeypatch, large, on_the_loop
):
    flat = cv2.imencode(".png", np.zeros((1500, 1500), np.uint8))[1].tobytes()
    assert len(flat) < 32 * 2**10
    threads = []
    prepare = lesion_scoring.prepare_or_error

    def noted(*arguments):
        threads.append(threading.current_thread().name)
        return prepare(*arguments)

    monkeypatch.setattr(lesion_scoring, "prepare_or_error", noted)
    service = LocalService(served_bundle(tmp_path / "bundle"), dermray_home)
    with service.client as client:
        answer = client.post("/v1/predict", files={"image": ("x", flat if large else lesion_image())})
    assert answer.status_code == 200
    assert [not name.startswith("decode") for name in threads] == [on_the_loop]
