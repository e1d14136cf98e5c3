"""Every hostile upload gets its documented answer, costs little, and leaves nothing behind that should not stay."""

from __future__ import annotations

import asyncio
import struct
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

from modeling.preprocessing import decode_image
from serve.settings import UploadLimits
from tests.bundle_factory import served_bundle
from tests.hostile_uploads import (
    MAX_IMAGE_BYTES,
    MAX_PIXELS,
    MULTIPART,
    SECRET,
    files,
    form,
    forms,
    image,
    jpeg,
    many_scans,
    part,
    text_field,
)
from tests.local_service import LocalService

pytestmark = pytest.mark.slow

LIMITS = UploadLimits(max_image_bytes=MAX_IMAGE_BYTES, max_pixels=MAX_PIXELS)
FILES = {case.name: case for case in files()}
FORMS = {case.name: case for case in forms()}
# What a decoder needs, and the orientation and pixel shape; no text.
JPEG_MARKERS = {0xC0, 0xC1, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("hostile") / "bundle")


@pytest.fixture
def served(reference, dermray_home):
    local = LocalService(reference, dermray_home, LIMITS)
    with local.client:
        yield local


@pytest.fixture
def decoded(monkeypatch):
    """Pixels of every picture that was decoded, in order."""
    sizes, decode = [], cv2.imdecode

    def counting(*arguments):
        picture = decode(*arguments)
        sizes.append(0 if picture is None else picture.shape[0] * picture.shape[1])
        return picture

    monkeypatch.setattr(cv2, "imdecode", counting)
    return sizes


@contextmanager
def memory_within(megabytes: float):
    """Fails when the process's memory peaks more than this above where it was; numpy and OpenCV included."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    yield
    assert peak() - before < megabytes


def check(response, status: int) -> dict | None:
    """The answer's body; what is no success has the one error shape, and says nothing of our inside."""
    assert response.status_code == status, response.text
    for name in response.headers:
        assert "evil" not in name
    body = response.json()
    if status != 200:
        assert set(body) == {"error", "detail"}
        assert body["detail"].isprintable() and 0 < len(body["detail"]) < 500
        assert "Traceback" not in body["detail"] and SECRET.decode() not in body["detail"]
    return body


def check_stored(served, status: int) -> None:
    """One row and one clean picture for a 200, nothing for anything else; what is secret, nowhere."""
    rows, images = served.rows(), served.image_files()
    assert len(rows) == len(images) == (1 if status == 200 else 0)
    for path in served.home.rglob("*"):
        if path.is_file():
            assert SECRET not in path.read_bytes(), path
    if images:
        kinds = stored_kinds(images[0].read_bytes())
        assert kinds <= (JPEG_MARKERS if images[0].suffix == ".jpg" else {b"IHDR", b"IDAT", b"IEND"})


def stored_kinds(data: bytes) -> set:
    """Markers of a JPEG before its first scan, or chunk types of a PNG; fails where something follows the end."""
    if data[:2] == b"\xff\xd8":
        kinds, at = set(), 2
        while not kinds & {0xDA}:
            kinds.add(data[at + 1])
            at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        assert data.endswith(b"\xff\xd9") and data.count(b"\xff\xd9") == 1
        return kinds
    kinds, at = set(), 8
    while at < len(data):
        assert b"IEND" not in kinds
        kinds.add(data[at + 4 : at + 8])
        at += 12 + struct.unpack(">I", data[at : at + 4])[0]
    return kinds


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_gets_its_status_at_little_cost(served, decoded, name):
    case = FILES[name]
    data = case.build()
    with memory_within(48):
        response = served.client.post("/v1/predict", files={"image": (SECRET.decode() + ".jpg", data)})
    answer = check(response, case.status)
    check_stored(served, case.status)
    if case.status in (413, 415):
        assert decoded == []
    assert max(decoded, default=0) <= MAX_PIXELS
    if case.status == 200:
        assert 0 <= answer["risk"] <= 1


@pytest.mark.parametrize("name", FORMS)
def test_a_hostile_form_gets_its_status(served, name):
    case = FORMS[name]
    headers = case.headers | ({"content-type": case.content_type} if case.content_type else {})
    response = served.client.post("/v1/predict", content=case.build(), headers=headers)
    check(response, case.status)
    check_stored(served, case.status)


def test_the_corpus_is_as_large_as_it_claims():
    assert len(files()) == len(FILES) and len(forms()) == len(FORMS)
    assert len(FILES) + len(FORMS) >= 150
    assert len(FILES["PNG of 13000x13000"].build()) < 30_000


def test_the_map_route_refuses_the_same_files(served, decoded):
    for case in FILES.values():
        response = served.client.post("/v1/explain", files={"image": ("a.jpg", case.build())})
        assert response.status_code == case.status, case.name
        if case.status != 200:
            check(response, case.status)
    assert max(decoded) <= MAX_PIXELS
    check_stored(served, 0)


@pytest.mark.parametrize(
    "name", [name for name, case in FILES.items() if case.status == 200 and case.build()[:2] == b"\xff\xd8"]
)
def test_the_stored_picture_has_the_pixels_that_were_scored(served, monkeypatch, name):
    seen = []
    monkeypatch.setattr("serve.lesion.decode_image", lambda data: seen.append(decode_image(data)) or seen[-1])
    served.client.post("/v1/predict", files={"image": ("a.jpg", FILES[name].build())})
    (path,) = served.image_files()
    (scored,) = seen
    assert np.array_equal(decode_image(path.read_bytes()), scored)


def send(served, body: bytes, announced: int, closed: bool) -> tuple[int, int]:
    """Sends a body under another length, as the HTTP server hands it on; (status, requests read)."""
    messages = [{"type": "http.request", "body": body, "more_body": closed}]
    if closed:
        messages.append({"type": "http.disconnect"})
    answers, reads = [], []

    async def receive():
        reads.append(1)
        return messages.pop(0)

    async def answer(message):
        answers.append(message)

    headers = [(b"content-type", MULTIPART.encode()), (b"content-length", str(announced).encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/predict",
        "raw_path": b"/v1/predict",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": headers,
    }
    asyncio.run(served.api(scope, receive, answer))
    return answers[0]["status"], len(reads)


def test_a_body_longer_or_shorter_than_announced_is_no_prediction(served):
    body = form(image(), text_field("metadata", b'{"age_approx": 60}'))
    # The server hands on no more than was announced, and closes when less comes.
    assert send(served, body[:-60], len(body) - 60, closed=False)[0] == 400
    assert send(served, body[:-60], len(body), closed=True)[0] == 400
    check_stored(served, 400)


def test_a_closing_boundary_is_found_across_messages(served):
    body = form(image(), text_field("metadata", b'{"age_approx": 60}'))

    def pieces():
        for at in range(0, len(body), 7):
            yield body[at : at + 7]

    response = served.client.post("/v1/predict", content=pieces(), headers={"content-type": MULTIPART})
    assert response.status_code == 200 and response.json()["context"] == "none"


def test_a_batch_may_repeat_its_images_and_nothing_else(served):
    pictures = [part('name="images"; filename="a.jpg"', jpeg())] * 2
    headers = {"content-type": MULTIPART}
    assert served.client.post("/v1/predict/batch", content=form(*pictures), headers=headers).status_code == 200
    twice = [text_field("device", b"a"), text_field("device", b"b")]
    response = served.client.post("/v1/predict/batch", content=form(*pictures, *twice), headers=headers)
    assert "device: given 2 times" in check(response, 422)["detail"]


def test_a_hundred_scans_are_the_limit(served):
    own = many_scans(0).count(b"\xff\xda")
    for count, status in ((100 - own, 200), (101 - own, 422)):
        response = served.client.post("/v1/predict", files={"image": ("a.jpg", many_scans(count))})
        assert response.status_code == status
