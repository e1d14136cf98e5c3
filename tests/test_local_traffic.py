"""A day's requests: what is sent of a data set, and what happens when the service asks to come back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import h5py
import numpy as np
import pytest

from local.traffic import Lesion, main, metadata_fields, read_lesions, send_day
from serve.api import Prediction

(ANSWER,) = Prediction.model_config["json_schema_extra"]["examples"]
CARD = {
    "model_version": "3",
    "digest": "9f2b" * 16,
    "task": "isic2024",
    "synthetic": True,
    "classes": ["benign", "malignant"],
    "malignant": ["malignant"],
    "contexts": {},
    "engine": "onnxruntime",
    "limits": {},
    "notice": "not a medical device",
}


class Service(BaseHTTPRequestHandler):
    """Answers like the service; the first request of every picture gets a 503, the picture `bad` a 422."""

    seen: dict[str, list[str]]
    lock = threading.Lock()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def _answer(self, status: int, body: dict, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._answer(200, CARD | {"metadata_fields": {"age_approx": {}, "sex": {}}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = {
            part.get_param("name", header="content-disposition"): part
            for part in BytesParser().parsebytes(head + body).get_payload()
        }
        name = parts["image"].get_payload(decode=True).decode("latin-1")
        with self.lock:
            keys = self.seen.setdefault(name, [])
            keys.append(self.headers["Idempotency-Key"])
            first = len(keys) == 1
        if name == "bad":
            self._answer(422, {"error": "undecodable_image", "detail": "image: truncated"})
        elif first:
            self._answer(503, {"error": "busy", "detail": "later"}, {"Retry-After": "0"})
        else:
            self._answer(200, ANSWER | {"band": None if name == "odd" else "low"})


@pytest.fixture
def service() -> Iterator[tuple[str, type[Service]]]:
    handler = type("Handler", (Service,), {"seen": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def test_a_refused_request_comes_back_under_its_key_and_everything_is_counted(service):
    url, handler = service
    lesions = [Lesion(name, name.encode(), {"sex": "male"}, {"patient_id": "P"}) for name in ("a", "b", "odd", "bad")]
    day = send_day(url, lesions, clients=3)
    assert day.sent == 4
    assert day.statuses == {200: 3, 422: 1}
    assert day.bands == {"low": 2, "abstained": 1}
    assert day.summary()["answered"] == 3
    for name in ("a", "b"):
        assert len(handler.seen[name]) == 2
        assert len(set(handler.seen[name])) == 1
    assert handler.seen["a"][0] != handler.seen["b"][0]


@pytest.fixture
def data_set(tmp_path):
    with h5py.File(tmp_path / "images.hdf5", "w") as file:
        file["ISIC_1"] = np.void(b"first\xff\xd9")
        file["ISIC_2"] = np.void(b"second\xff\xd9")
    (tmp_path / "metadata.csv").write_text(
        "isic_id,patient_id,age_approx,sex,target,attribution\nISIC_1,IP_1,55,,0,Clinic A\nISIC_2,IP_2,,male,1,\n"
    )
    return tmp_path / "images.hdf5", tmp_path / "metadata.csv"


def test_only_known_fields_with_a_value_are_sent_and_never_the_label(data_set):
    first, second = read_lesions(*data_set, fields={"age_approx", "sex"})
    assert (first.image, second.image) == (b"first\xff\xd9", b"second\xff\xd9")
    assert first.metadata == {"age_approx": 55.0}
    assert second.metadata == {"sex": "male"}
    assert first.origin == {"patient_id": "IP_1", "institution": "Clinic A"}
    assert second.origin == {"patient_id": "IP_2"}


def test_the_command_prints_its_counts(service, data_set, capsys):
    url, _ = service
    assert metadata_fields(url) == {"age_approx", "sex"}
    images, metadata = map(str, data_set)
    assert main(["--url", url, "--images", images, "--metadata", metadata, "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["answered"] == 1


def test_mistakes_are_one_line(service, data_set, capsys):
    url, _ = service
    images, metadata = map(str, data_set)
    assert main(["--url", url, "--images", "/nowhere.hdf5", "--metadata", metadata]) == 2
    assert main(["--url", "http://127.0.0.1:9", "--images", images, "--metadata", metadata]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "/nowhere.hdf5" in lines[0]
