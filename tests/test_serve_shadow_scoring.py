"""A shadow scores a copy of the traffic, and whatever becomes of it, the answers are as without it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time

import numpy as np
import pytest

from monitoring.prediction_log import PredictionRecord, patient_hmac
from serve import shadow_model, shadow_scoring
from serve.image_scorer import ImageScores
from serve.lesion import PreparedImage, prepare
from serve.lesion_scoring import ScoredLesion
from serve.metadata_fusion import FusedRisk, FusedRisks
from serve.served_model import ServedModel
from serve.settings import IngressSettings, ModelReference, ServeSettings, UploadLimits
from serve.shadow_scoring import CopyScoring, ShadowScoring, is_shadowed
from serve.shadow_settings import ShadowReference, ShadowSettings
from store.database import StoreUnavailableError
from store.image_files import StoredImage
from store.shadow_records import shadow_id
from tests.bundle_factory import LocalFusion, LocalScorer, lesion_image, served_bundle, storage
from tests.local_service import LocalService
from tests.tiny_bundle import SIZE, tiny_bundle

METADATA = {"age_approx": 60, "sex": "female"}
ALL_CONTEXTS = ["image_only", "none", "patient"]


def wait_for(condition, what="it"):
    deadline = time.monotonic() + 20
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)
    return value


def patient_bundle(directory, version, bias=0.0):
    bundle = tiny_bundle(directory, contexts=ALL_CONTEXTS, onnx_bias=bias, torch_bias=bias)
    return ModelReference(bundle_uri=str(directory), sha256=bundle.digest, version=version)


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    return patient_bundle(tmp_path_factory.mktemp("shadow") / "champion", "7")


@pytest.fixture(scope="module")
def challenger(tmp_path_factory):
    return patient_bundle(tmp_path_factory.mktemp("shadow") / "challenger", "8", bias=1.5)


class GatedScorer(LocalScorer):
    """Answers while its gate is open and nothing is to be raised; remembers the pictures' shapes."""

    def __init__(self, reference):
        super().__init__(reference)
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.shapes: list[tuple[int, ...]] = []

    async def score(self, images, deadline):
        self.shapes.append(images.shape)
        while not self.gate.is_set():
            await asyncio.sleep(0.005)
        if self.error is not None:
            raise self.error
        return await super().score(images, deadline)


class Shadowed(LocalService):
    """A service with a champion, and a shadow whose network can be held up."""

    def __init__(self, champion, challenger, home, **settings):
        super().__init__(champion, home)
        self.reference = ShadowReference(model=challenger, settings=ShadowSettings(**settings))
        self.network = GatedScorer(challenger)
        scoring = CopyScoring(self.network, LocalFusion(challenger), UploadLimits(), IngressSettings(), 4)
        model = ServedModel.load(challenger)
        self.shadow = ShadowScoring(self.reference, model, scoring, self.service._log)
        self.service.use_shadow(self.shadow)

    def predict(self, seed=0, **headers):
        data = {"metadata": json.dumps(METADATA), "patient_id": f"patient {seed}", "institution": "clinic"}
        answer = self.client.post("/v1/predict", files={"image": ("x", lesion_image(seed))}, data=data, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def send(self, path, seeds, headers=None, **data):
        files = [("images", ("x", lesion_image(seed))) for seed in seeds]
        answer = self.client.post(path, files=files, data=data, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def shadows(self):
        return {row["id"]: row for row in self.log.store.predictions_between(0, 2**62, "shadow")}

    def counts(self):
        shadow = self.client.get("/v1/model").json()["shadow"]
        return shadow["scored"], shadow["dropped"], shadow["failed"]

    def wait_for_counts(self, *expected):
        wait_for(lambda: self.counts() == expected, f"{expected} rather than {self.counts()}")


@pytest.fixture
def shadowed(champion, challenger, dermray_home):
    made = Shadowed(champion, challenger, dermray_home)
    with made.client:
        yield made
        made.network.gate.set()
        made.client.portal.call(made.shadow.stop)


def make(champion, challenger, home, **settings):
    return Shadowed(champion, challenger, home, **settings)


def test_a_shadows_record_lies_beside_the_champions(shadowed, champion, challenger, tmp_path):
    answer = shadowed.predict(3, **{"Idempotency-Key": "visit-3"})
    shadowed.wait_for_counts(1, 0, 0)
    (row,) = shadowed.rows()
    assert row["id"] == answer["prediction_id"] and row["role"] == "champion"
    shadow = shadowed.shadows()[shadow_id(row["id"])]
    same = ("received_at", "acquired_at", "caller", "patient_hmac", "institution", "device", "image_hash", "metadata")
    assert {name: shadow[name] for name in same} == {name: row[name] for name in same}
    assert shadow["idempotency_key"] is None and shadow["model_version"] == "8" and row["model_version"] == "7"
    # As the challenger itself would have answered.
    alone = LocalService(challenger, tmp_path)
    data = {"metadata": json.dumps(METADATA)}
    expected = alone.client.post("/v1/predict", files={"image": ("x", lesion_image(3))}, data=data).json()
    for name in ("risk", "image_score", "class_probabilities", "band", "threshold", "context", "abstained", "reasons"):
        assert shadow[name] == pytest.approx(expected[name]) if name == "risk" else shadow[name] == expected[name], name
    assert shadow["risk"] != row["risk"] and shadow["embedding"] is not None
    assert {"score", "fuse", "total"} <= set(shadow["stage_ms"])


def test_who_reads_the_log_sees_the_champion_unless_the_shadow_is_asked_for(shadowed):
    found = shadowed.predict()["prediction_id"]
    shadowed.wait_for_counts(1, 0, 0)
    get = shadowed.client.get

    def listed(**query):
        return [item["prediction_id"] for item in get("/v1/predictions", params=query).json()["items"]]

    assert listed() == [found] and listed(role="shadow") == [shadow_id(found)]
    assert get(f"/v1/predictions/{shadow_id(found)}").json()["role"] == "shadow"
    summary = get("/v1/monitoring/summary").json()
    assert (summary["predictions"], summary["by_model_version"]) == (1, {"7": 1})
    (pair,) = summary["shadow"]
    assert (pair["champion_version"], pair["shadow_version"], pair["pairs"]) == ("7", "8", 1)
    label = {"prediction_id": shadow_id(found), "label": "malignant"}
    refused = shadowed.client.post("/v1/labels", json=label)
    assert refused.status_code == 422 and f"expected '{found}'" in refused.json()["detail"]
    assert shadowed.client.post("/v1/labels", json=label | {"prediction_id": found}).status_code == 201


def test_a_patients_lesions_are_shadowed_together(shadowed, challenger, tmp_path):
    sent = {"patient_id": "patient 1", "metadata": json.dumps([METADATA, None, METADATA])}
    answer = shadowed.send("/v1/patients/triage", [1, 2, 3], **sent)
    shadowed.wait_for_counts(3, 0, 0)
    alone = Shadowed(challenger, challenger, tmp_path)
    alone.service.use_shadow(None)
    expected = {item["index"]: item["risk"] for item in alone.send("/v1/patients/triage", [1, 2, 3], **sent)["lesions"]}
    for lesion in answer["lesions"]:
        row = shadowed.shadows()[shadow_id(lesion["prediction_id"])]
        assert row["context"] == "patient" and row["risk"] == pytest.approx(expected[lesion["index"]])


def test_a_batch_is_shadowed_without_what_was_refused(shadowed):
    answers = shadowed.client.post(
        "/v1/predict/batch",
        files=[("images", ("x", lesion_image(seed))) for seed in range(40)] + [("images", ("x", b"text"))],
    ).json()
    shadowed.wait_for_counts(40, 0, 0)
    assert set(shadowed.shadows()) == {shadow_id(answer["prediction_id"]) for answer in answers[:40]}


def test_a_repeated_key_is_not_shadowed_again(shadowed):
    for _ in range(3):
        shadowed.predict(5, **{"Idempotency-Key": "again"})
    shadowed.predict(6)
    shadowed.wait_for_counts(2, 0, 0)
    assert len(shadowed.shadows()) == 2


def test_answers_do_not_wait_for_a_shadow_that_hangs(champion, challenger, dermray_home):
    shadowed = make(champion, challenger, dermray_home, timeout_s=0.3)
    shadowed.network.gate.clear()
    with shadowed.client:
        first = shadowed.predict(1)
        wait_for(lambda: shadowed.network.shapes, "the shadow's call")
        # It hangs now, and others are answered and can be read.
        second = shadowed.predict(2)
        assert shadowed.counts() == (0, 0, 0)
        assert shadowed.client.get("/readyz").json()["checks"] == {
            "image_scorer": "ok",
            "metadata_fusion": "ok",
            "log": "ok",
        }
        wait_for(lambda: shadowed.counts()[2] >= 1, "the end of its time")
        third = shadowed.predict(3)
        wait_for(lambda: sum(shadowed.counts()) == 3, "a verdict on all copies")
        assert shadowed.shadow.waiting_bytes == 0 and shadowed.counts()[0] == 0
        assert {row["id"] for row in shadowed.rows()} == {item["prediction_id"] for item in (first, second, third)}
        assert shadowed.shadows() == {}


def test_a_shadow_that_fails_pauses_and_comes_back(shadowed, monkeypatch, caplog):
    monkeypatch.setattr(shadow_scoring, "_FIRST_PAUSE_S", 0.3)
    shadowed.network.error = RuntimeError("out of memory")
    answer = shadowed.predict(1)
    shadowed.wait_for_counts(0, 0, 1)
    paused_until = shadowed.shadow._paused_until
    assert shadowed.predict(2)["risk"] is not None and answer["risk"] is not None
    assert time.monotonic() < paused_until and shadowed.counts() == (0, 1, 1)
    assert len(shadowed.network.shapes) == 1
    assert "shadow 8 failed" in caplog.text and "out of memory" in caplog.text
    wait_for(lambda: time.monotonic() > paused_until, "the end of the pause")
    shadowed.predict(3)
    shadowed.wait_for_counts(0, 1, 2)
    assert shadowed.shadow._pause_s == pytest.approx(0.6), "twice as long after the second failure"
    shadowed.network.error = None
    wait_for(lambda: time.monotonic() > shadowed.shadow._paused_until, "the end of the pause")
    shadowed.predict(4)
    shadowed.wait_for_counts(1, 1, 2)
    assert shadowed.shadow._pause_s == 0


def test_what_the_shadow_model_does_not_answer_is_no_failure_of_its_node(champion, dermray_home, tmp_path):
    shadowed = make(champion, served_bundle(tmp_path / "bundle", version="9"), dermray_home)
    with shadowed.client:
        shadowed.send("/v1/patients/triage", [1, 2], patient_id="patient 1")
        shadowed.wait_for_counts(0, 0, 2)
        shadowed.predict()
        shadowed.wait_for_counts(1, 0, 2)


def test_a_fault_in_copying_fails_no_answer(shadowed, monkeypatch):
    def fail(*_):
        raise RuntimeError("no copy")

    monkeypatch.setattr(shadowed.shadow, "_copy_of", fail)
    assert shadowed.predict()["risk"] is not None
    assert shadowed.counts() == (0, 0, 1)


@pytest.mark.parametrize("waiting", [True, False])
def test_an_erased_patient_is_erased_from_the_shadow_too(shadowed, waiting):
    if waiting:
        shadowed.network.gate.clear()
    shadowed.predict(1)
    shadowed.predict(2)
    if waiting:
        wait_for(lambda: shadowed.network.shapes, "the shadow's call")
    else:
        shadowed.wait_for_counts(2, 0, 0)
    assert shadowed.client.delete("/v1/patients/patient 1").status_code == 200
    shadowed.network.gate.set()
    shadowed.wait_for_counts(2, 0, 0)
    (left,) = shadowed.rows()
    assert set(shadowed.shadows()) == {shadow_id(left["id"])}
    assert left["patient_hmac"] == patient_hmac("patient 2", b"a test's secret")


def test_while_the_store_is_away_both_records_wait_in_the_spool(shadowed):
    shadowed.sidecar.down = StoreUnavailableError("no disk")
    found = shadowed.predict()["prediction_id"]
    shadowed.wait_for_counts(1, 0, 0)
    assert shadowed.log.spool.pending() == 2
    shadowed.sidecar.down = None
    wait_for(lambda: shadowed.log.spool.pending() == 0, "the replay")
    assert [row["id"] for row in shadowed.rows()] == [found] and set(shadowed.shadows()) == {shadow_id(found)}


def test_the_fraction_is_chosen_by_the_prediction_id():
    names = [f"{number:032x}" for number in range(4000)]
    chosen = {name for name in names if is_shadowed(name, 0.25)}
    assert chosen == {name for name in names if is_shadowed(name, 0.25)}
    assert 0.22 < len(chosen) / len(names) < 0.28
    assert chosen < {name for name in names if is_shadowed(name, 0.5)}
    assert all(is_shadowed(name, 1.0) for name in names) and not any(is_shadowed(name, 0.0) for name in names)


def test_a_fraction_of_the_traffic_is_shadowed_and_a_patient_is_not_torn_apart(champion, challenger, dermray_home):
    shadowed = make(champion, challenger, dermray_home, fraction=0.5)
    with shadowed.client:
        answers = shadowed.send("/v1/predict/batch", range(30), headers={"Idempotency-Key": "batch"})
        ids = [answer["prediction_id"] for answer in answers]
        patients = [
            [lesion["prediction_id"] for lesion in answer["lesions"]]
            for answer in (
                shadowed.send(
                    "/v1/patients/triage", [number, 100 + number], {"Idempotency-Key": f"p{number}"}, patient_id="p"
                )
                for number in range(6)
            )
        ]
        expected = {shadow_id(name) for name in ids if is_shadowed(name, 0.5)}
        assert 0 < len(expected) < 30
        wait_for(lambda: shadowed.shadow.waiting_bytes == 0, "the last copy")
        stored = set(shadowed.shadows())
        assert stored & {shadow_id(name) for name in ids} == expected
        whole = [{shadow_id(name) for name in lesions} & stored for lesions in patients]
        assert {len(found) for found in whole} == {0, 2}


# Without a service: the queue alone.


class HeldNodes:
    """Scorer and fusion of no model, which answer while `gate` is set."""

    def __init__(self, digest):
        self.digest = digest
        self.gate = asyncio.Event()
        self.images: list[np.ndarray] = []

    async def score(self, images, deadline):
        self.images.append(images)
        await self.gate.wait()
        rows = len(images)
        scores = np.full((rows, 2), np.log(0.5), np.float32)
        return ImageScores(self.digest, scores, np.zeros((rows, 64), np.float32))

    async def fuse(self, log_probabilities, records):
        risk = FusedRisk("none", {"benign": 0.5, "malignant": 0.5}, 0.5, "high", 0.1)
        return FusedRisks(self.digest, [risk] * len(records))


class Log:
    """Keeps what is written."""

    def __init__(self):
        self.records: list[PredictionRecord] = []

    async def write(self, entry):
        assert entry.images == {}
        self.records += entry.records


def queue(challenger, input_size=SIZE, **settings):
    """A shadow, its nodes and its log."""
    model = dataclasses.replace(ServedModel.load(challenger), input_size=input_size)
    nodes, log = HeldNodes(model.digest), Log()
    scoring = CopyScoring(nodes, nodes, UploadLimits(), IngressSettings(), 32)
    reference = ShadowReference(model=challenger, settings=ShadowSettings(**settings))
    return ShadowScoring(reference, model, scoring, log), nodes, log


def answered(name, picture: PreparedImage | None = None):
    """A champion's record and the lesion that it was made of."""
    picture = picture or PreparedImage(
        np.zeros((SIZE, SIZE, 3), np.uint8), {"brightness": 0.5}, StoredImage("a" * 64, bytes(50_000), ".jpg")
    )
    record = PredictionRecord(id=name, model_version="7", context="none", image_hash="a" * 64)
    return record, ScoredLesion(0, picture, None, [], None)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def test_copies_are_bounded_in_bytes_and_what_does_not_fit_is_dropped(challenger):
    async def run():
        shadow, nodes, log = queue(challenger, max_bytes=2**20, concurrency=2)
        for number in range(100):
            shadow.offer([answered(f"{number}-{item}") for item in range(8)], patient=False)
            assert shadow.waiting_bytes <= 2**20
        held = 800 - shadow.dropped
        assert 0 < held < 2**20 / (SIZE * SIZE * 3) and shadow.dropped > 0
        await until(lambda: nodes.images)
        nodes.gate.set()
        await until(lambda: shadow.waiting_bytes == 0)
        assert (shadow.scored, shadow.failed) == (held, 0) and len(log.records) == held
        shadow.stop()

    asyncio.run(run())


def test_stored_bytes_are_held_only_where_the_picture_is_decoded_again(challenger):
    async def run(input_size):
        shadow, nodes, _ = queue(challenger, input_size)
        nodes.gate.set()
        data = lesion_image(4)
        shadow.offer([answered("a", prepare(data, SIZE, UploadLimits()))], patient=False)
        held = shadow.waiting_bytes
        await until(lambda: shadow.waiting_bytes == 0)
        shadow.stop()
        assert (shadow.scored, shadow.failed) == (1, 0)
        return held, nodes.images[0][0], prepare(data, input_size, UploadLimits())

    same, pixels, expected = asyncio.run(run(SIZE))
    assert np.array_equal(pixels, expected.pixels)
    larger, pixels, expected = asyncio.run(run(2 * SIZE))
    assert np.array_equal(pixels, expected.pixels) and pixels.shape == (2 * SIZE, 2 * SIZE, 3)
    assert larger == same + len(expected.stored.data)


def test_a_copy_that_waits_too_long_is_dropped(challenger):
    async def run():
        shadow, nodes, _ = queue(challenger, concurrency=1, max_wait_s=0.1)
        shadow.offer([answered("first")], patient=False)
        await until(lambda: nodes.images)
        shadow.offer([answered("second")], patient=False)
        await asyncio.sleep(0.15)
        shadow.offer([answered("third")], patient=False)
        nodes.gate.set()
        await until(lambda: shadow.waiting_bytes == 0)
        assert (shadow.scored, shadow.dropped, shadow.failed) == (2, 1, 0)
        shadow.stop()

    asyncio.run(run())


def test_an_offer_returns_before_any_of_its_work_is_done(challenger):
    async def run():
        shadow, nodes, _ = queue(challenger)
        shadow.offer([answered("a")], patient=False)
        # The answer is sent in the loop's next turns.
        for _ in range(10):
            await asyncio.sleep(0)
        assert nodes.images == [] and shadow.waiting_bytes > 0
        shadow.stop()
        assert (shadow.waiting_bytes, shadow.dropped) == (0, 1)
        shadow.offer([answered("b")], patient=False)
        assert (shadow.waiting_bytes, shadow.dropped) == (0, 2)

    asyncio.run(run())


def test_a_shadow_that_ends_leaves_nothing_under_way(challenger):
    async def run():
        shadow, nodes, log = queue(challenger)
        shadow.offer([answered("a")], patient=False)
        await until(lambda: nodes.images)
        shadow.stop()
        await until(lambda: shadow.waiting_bytes == 0)
        nodes.gate.set()
        await asyncio.sleep(0)
        # Cancelled, rather than ended by its time.
        assert log.records == [] and shadow.failed == 0 and len(asyncio.all_tasks()) == 1

    asyncio.run(run())


# Which shadow an ingress replica has.


def test_a_replica_keeps_its_shadow_changes_it_and_lives_without(shadowed, monkeypatch, tmp_path, caplog, champion):
    settings = ServeSettings(storage=storage(tmp_path))
    handles = []

    class Handle:
        score = explain = describe = fuse = fuse_patient = None

        def options(self, **_):
            return self

    monkeypatch.setattr(shadow_model, "shadow_handle", lambda shadow: handles.append(shadow) or Handle())
    service = shadowed.service

    def switch(wanted):
        asyncio.run(shadow_model.switch_shadow(service, wanted, settings, service._log))
        return service.shadow

    assert switch(shadowed.reference) is shadowed.shadow and handles == []
    slower = shadowed.reference.model_copy(update={"settings": ShadowSettings(fraction=0.1)})
    changed = switch(slower)
    assert changed is not shadowed.shadow and changed.describe()["fraction"] == 0.1 and handles == [slower]
    gone = ModelReference(bundle_uri=str(tmp_path / "gone"), sha256="0" * 64, version="9")
    assert switch(ShadowReference(model=gone)) is None and "no shadow: model 9 does not load" in caplog.text
    assert shadowed.predict()["model_version"] == "7"
    assert switch(None) is None
    assert shadowed.client.get("/v1/model").json()["shadow"] is None
