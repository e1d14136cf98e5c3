"""Where pictures are decoded: small ones, in pixels and not only in bytes, apart from large ones."""

from __future__ import annotations

import threading

import cv2
import numpy as np
import pytest

from serve import lesion_scoring
from store.image_files import prepare_image
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


def test_a_photo_does_not_wait_for_the_tiles_of_others(tmp_path, dermray_home):
    service = LocalService(served_bundle(tmp_path / "bundle"), dermray_home)
    leave = threading.Event()
    service.service.scoring._small_thread.submit(leave.wait, 50)
    try:
        with service.client as client:
            answer = client.post("/v1/predict", files={"image": ("x", lesion_image(1, 1500, ".png"))})
        assert answer.status_code == 200 and not leave.is_set()
    finally:
        leave.set()


def test_large_pictures_are_decoded_beside_the_tiles_of_a_request_and_all_keep_their_places(
    tmp_path, dermray_home, monkeypatch
):
    large = [lesion_image(seed, 1500, ".png") for seed in range(2)]
    tiles = [lesion_image(seed) for seed in range(2, 6)]
    given = [tiles[0], large[0], b"text", tiles[1], large[1], tiles[2], tiles[3]]
    threads = {}
    prepare = lesion_scoring.prepare_or_error

    def noted(data, *arguments):
        threads[data] = threading.current_thread().name
        return prepare(data, *arguments)

    monkeypatch.setattr(lesion_scoring, "prepare_or_error", noted)
    service = LocalService(served_bundle(tmp_path / "bundle"), dermray_home)
    with service.client as client:
        answers = client.post("/v1/predict/batch", files=[("images", ("x", data)) for data in given]).json()
    assert ["error" in answer for answer in answers] == [data == b"text" for data in given]
    hashes = {row["id"]: row["image_hash"] for row in service.rows()}
    kept = [None if data == b"text" else prepare_image(data).hash for data in given]
    assert [hashes.get(answer.get("prediction_id")) for answer in answers] == kept
    assert len({threads[tile] for tile in tiles}) == 1
    assert not {threads[picture] for picture in large} & {threads[tile] for tile in tiles}
