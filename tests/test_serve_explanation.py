"""The map is drawn where the evidence is, as strong as it is, in the picture as the network saw it."""

from __future__ import annotations

import asyncio
import dataclasses
import struct

import cv2
import numpy as np
import pytest

from modeling.preprocessing import decode_image
from modeling.schema import TaskSpec
from serve.explanation import FULL_COLOUR, MAX_SIDE, likeliest_malignant, weight_of_evidence
from serve.image_scorer import ImageScorer
from serve.served_model import ServedModel
from serve.settings import IngressSettings, UploadLimits
from tests.bundle_factory import blank_image, lesion_rule, served_bundle
from tests.local_service import LocalService
from tests.tiny_bundle import SIZE, expected_outputs

LIMITS = UploadLimits(max_image_bytes=2_000_000, max_pixels=6_000_000)
SCALE = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]
PACKED = SCALE.astype(int) @ [65536, 256, 1]


def evidence(colour) -> float:
    """What the tiny network, which is linear per pixel, says for malignant at a pixel of this RGB colour."""
    logits, _ = expected_outputs(np.full((1, 1, 1, 3), colour, np.uint8))
    return float(logits[0, 1] - logits[0, 0])


_CUBE = [(red, green, blue) for red in (0, 85, 170, 255) for green in (0, 85, 170, 255) for blue in (0, 85, 170, 255)]
FOR, AGAINST = max(_CUBE, key=evidence), min(_CUBE, key=evidence)
FAINT = min((colour for colour in _CUBE if evidence(colour) > 0.05), key=evidence)
assert evidence(FOR) > FULL_COLOUR and evidence(AGAINST) < -0.1 and evidence(FAINT) < 0.5


def picture(width: int, height: int, spot: tuple[float, float, float, float], colour=FOR, ground=AGAINST) -> np.ndarray:
    """uint8 RGB; `spot` = left, top, right, bottom as shares of the picture."""
    image = np.full((height, width, 3), ground, np.uint8)
    left, top, right, bottom = spot
    image[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = colour
    return image


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()


def indices(drawn: np.ndarray) -> np.ndarray:
    """Strength 0 to 255 of each pixel of a map drawn alone, uint8 RGB (H, W, 3)."""
    order = np.argsort(PACKED)
    packed = drawn.astype(int) @ [65536, 256, 1]
    found = order[np.searchsorted(PACKED, packed, sorter=order).clip(max=255)]
    assert np.array_equal(PACKED[found], packed), "a colour that the scale does not have"
    return found


def centre_of_mass(weights: np.ndarray) -> tuple[float, float]:
    """(x, y) as shares of the picture."""
    height, width = weights.shape
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    return float(weights.sum(axis=0) @ x / weights.sum()), float(weights.sum(axis=1) @ y / weights.sum())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return served_bundle(tmp_path_factory.mktemp("explained") / "bundle", version="7")


@pytest.fixture
def served(reference, dermray_home):
    local = LocalService(reference, dermray_home, LIMITS)
    with local.client:
        yield local


def explain(served, data: bytes, **form):
    return served.client.post("/v1/explain", files={"image": ("a.jpg", data)}, data=form)


def drawn(served, data: bytes, **form) -> np.ndarray:
    response = explain(served, data, **form)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    return decode_image(response.content)


def problem(response, status, text=""):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "detail"} and "\n" not in body["detail"] and text in body["detail"]


@pytest.mark.parametrize(
    ("width", "height", "shown"),
    [
        (64, 64, (64, 64)),
        (240, 80, (240, 80)),
        (48, 200, (48, 200)),
        (2400, 1200, (1024, 512)),
        (900, 1800, (512, 1024)),
        (10, 12, (10, 12)),
    ],
)
@pytest.mark.parametrize("corner", [(0, 0), (0.75, 0), (0, 0.75), (0.75, 0.75)])
def test_the_strongest_colour_is_where_the_evidence_is(served, width, height, shown, corner):
    left, top = corner
    image = picture(width, height, (left, top, left + 0.25, top + 0.25))
    strength = indices(drawn(served, png(image), view="map")).astype(float)
    assert strength.shape == shown[::-1]
    x, y = centre_of_mass(strength)
    assert abs(x - left - 0.125) < 0.03 and abs(y - top - 0.125) < 0.03
    overlay = drawn(served, png(image)).astype(int)
    unchanged = cv2.resize(image, shown, interpolation=cv2.INTER_AREA).astype(int)
    row, column = np.unravel_index(np.abs(overlay - unchanged).sum(axis=2).argmax(), overlay.shape[:2])
    assert left <= column / shown[0] < left + 0.25 and top <= row / shown[1] < top + 0.25


@pytest.mark.parametrize(("width", "height"), [(SIZE * 20, SIZE * 10), (SIZE * 7, SIZE * 7), (SIZE * 90, SIZE * 15)])
def test_the_map_is_centred_on_its_cell_to_less_than_a_pixel(served, width, height):
    row, column = 3, 11
    spot = (column / SIZE, row / SIZE, (column + 1) / SIZE, (row + 1) / SIZE)
    strength = indices(drawn(served, png(picture(width, height, spot)), view="map")).astype(float)
    x, y = centre_of_mass(strength)
    assert abs(x * strength.shape[1] - (column + 0.5) * strength.shape[1] / SIZE) < 0.25
    assert abs(y * strength.shape[0] - (row + 0.5) * strength.shape[0] / SIZE) < 0.25


def test_a_turned_photograph_is_drawn_as_the_network_saw_it(served):
    lying = picture(160, 80, (0, 0, 0.25, 0.25))
    data = cv2.imencode(".jpg", lying[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    # Orientation 6: a quarter turn to the right, so the top left corner goes to the top right.
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    turned = data[:2] + b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff + data[2:]
    strength = indices(drawn(served, turned, view="map")).astype(float)
    assert strength.shape == (160, 80)
    x, y = centre_of_mass(strength)
    assert x > 0.75 and y < 0.25
    both = drawn(served, turned, view="side_by_side")
    assert both.shape == (160, 160, 3)
    assert np.abs(both[:, :80].astype(int) - decode_image(turned)).max() == 0


def test_a_place_without_evidence_is_left_as_it_is(served):
    image = picture(96, 64, (0.5, 0, 1, 1))
    overlay = drawn(served, png(image))
    assert np.array_equal(overlay[:, :36], image[:, :36])
    assert np.abs(overlay[:, 60:].astype(int) - image[:, 60:]).max() > 15
    # Nothing speaks for it anywhere: nothing is drawn.
    clean = picture(96, 64, (0, 0, 0, 0))
    assert np.array_equal(drawn(served, png(clean)), clean)
    assert indices(drawn(served, png(clean), view="map")).max() == 0


def test_faint_evidence_stays_faint_and_strong_evidence_is_not_cut_off(served):
    faint = picture(64, 64, (0.5, 0.5, 1, 1), FAINT)
    assert indices(drawn(served, png(faint), view="map")).max() == round(255 * evidence(FAINT) / FULL_COLOUR)
    assert np.abs(drawn(served, png(faint)).astype(int) - faint).max() <= 5
    strong = picture(64, 64, (0.5, 0.5, 1, 1), FOR)
    expected = round(255 * evidence(FOR) / max(evidence(FOR), FULL_COLOUR))
    assert indices(drawn(served, png(strong), view="map")).max() == expected


def test_another_class_has_the_other_places(served):
    image = picture(96, 96, (0, 0, 0.5, 1))
    default = explain(served, png(image), view="map")
    asked = explain(served, png(image), view="map", target_class="malignant")
    benign = explain(served, png(image), view="map", target_class="benign")
    assert default.headers["X-Dermray-Class"] == "malignant" and benign.headers["X-Dermray-Class"] == "benign"
    assert default.content == asked.content
    strength = indices(decode_image(benign.content))
    assert strength[:, 60:].min() > 0 and strength[:, :36].max() == 0


def test_an_answer_says_which_model_made_it_and_is_no_prediction(served, reference):
    response = explain(served, png(picture(64, 64, (0, 0, 0.5, 0.5))))
    assert response.headers["X-Dermray-Model-Version"] == "7"
    assert response.headers["X-Dermray-Digest"] == reference.sha256
    assert "X-Dermray-Abstained" not in response.headers
    assert "Not a medical device" in response.headers["X-Dermray-Notice"]
    assert served.rows() == [] and served.image_files() == []


def test_a_picture_that_the_model_abstains_from_has_its_map_and_says_why(dermray_home, tmp_path):
    careful = LocalService(served_bundle(tmp_path / "bundle", abstention=lesion_rule()), dermray_home)
    with careful.client:
        answer = careful.client.post("/v1/predict", files={"image": ("a.png", blank_image())}).json()
        response = explain(careful, blank_image())
        assert response.status_code == 200 and decode_image(response.content).shape == (48, 48, 3)
        assert response.headers["X-Dermray-Abstained"] == ", ".join(answer["reasons"]) != ""
        careful.service.scoring.settings = IngressSettings(abstain=False)
        assert "X-Dermray-Abstained" not in explain(careful, blank_image()).headers


@pytest.mark.parametrize(
    ("data", "form", "status", "text"),
    [
        (b"hello", {}, 415, "image: not a JPEG"),
        (b"", {}, 422, "image: the file is empty"),
        (png(picture(64, 64, (0, 0, 1, 1)))[:80], {}, 422, "image: "),
        (png(np.zeros((2000, 3001, 3), np.uint8)), {}, 413, "3001x2000 pixels"),
        (b"\xff\xd8\xff" + bytes(2_000_000), {}, 413, "max_image_bytes"),
        (blank_image(), {"target_class": "melanoma"}, 422, "'melanoma'; expected one of benign, malignant"),
        (blank_image(), {"target_class": "\udc80\r\n".encode("utf-8", "replace")}, 422, "target_class: "),
        (blank_image(), {"view": "negative"}, 422, "view: "),
        (blank_image(), {"metadata": "{}"}, 422, "metadata: unknown form field"),
    ],
)
def test_a_wrong_request_names_the_field(served, data, form, status, text):
    problem(explain(served, data, **form), status, text)


def test_no_answer_in_time_is_503(served, monkeypatch):
    async def hang(image):
        await asyncio.Event().wait()

    monkeypatch.setattr(served.scorer, "explain", hang)
    served.service.scoring.settings = IngressSettings(request_timeout_s=0.2)
    response = explain(served, blank_image())
    problem(response, 503, "no answer within 0.2 s")
    assert int(response.headers["Retry-After"]) >= 1


def test_no_map_of_one_model_under_the_name_of_another(served, tmp_path, monkeypatch):
    served.service.use_model(ServedModel.load(served_bundle(tmp_path / "other", version="8", onnx_bias=2.0)))
    monkeypatch.setattr("serve.prediction_service._ROLLOUT_TIMEOUT_S", 0.2)
    problem(explain(served, blank_image()), 503, "new model is being rolled out")


def test_names_that_no_header_can_hold_are_percent_encoded(served, monkeypatch):
    task = served.service.model.task.model_copy(update={"classes": ["benign", "m\u00e9lanome\r\n\u9ed1"]})
    task = task.model_copy(update={"malignant": task.classes[1:]})
    served.service.use_model(dataclasses.replace(served.service.model, task=task))
    response = explain(served, blank_image())
    assert response.status_code == 200
    assert response.headers["X-Dermray-Class"] == "m%C3%A9lanome%0D%0A%E9%BB%91"


def test_the_documentation_promises_a_png(served):
    answers = served.client.get("/openapi.json").json()["paths"]["/v1/explain"]["post"]["responses"]
    assert set(answers["200"]["content"]) == {"image/png"}
    assert "X-Dermray-Class" in answers["200"]["headers"]
    assert {"413", "415", "422", "503"} <= set(answers)


def test_evidence_is_the_networks_own_log_odds_over_those_of_its_training_sample():
    rng = np.random.default_rng(0)
    maps, bias = rng.normal(0, 3, (4, 1, 1)), rng.normal(0, 1, 4)
    logits, prior = maps[:, 0, 0] + bias, np.array([0.7, 0.1, 0.15, 0.05])
    probabilities = np.exp(logits) / np.exp(logits).sum()
    for target in range(4):
        expected = np.log(probabilities[target] / (1 - probabilities[target]) / (prior[target] / (1 - prior[target])))
        assert weight_of_evidence(maps, logits, prior, target) == pytest.approx(expected)
    # A class that was never seen in training is no reason for infinite evidence.
    assert np.isfinite(weight_of_evidence(maps, logits, np.array([0.5, 0.5, 0, 0]), 2)).all()


def test_without_a_class_the_likeliest_malignant_one_is_explained():
    names = ["nv", "mel", "bcc"]
    task = TaskSpec(name="x", fold_group="lesion", label_column="dx", classes=names, malignant=["mel", "bcc"])
    assert [likeliest_malignant(task, np.array(row)) for row in ([9, 1, 2], [9, 2, 1], [-9, -3, -2])] == [2, 1, 2]


def test_the_deployment_gives_maps_of_pictures_that_fit_and_none_of_others(reference):
    async def ask():
        scorer = ImageScorer({})
        await scorer.reconfigure(reference.model_dump())
        fits = np.full((1, SIZE, SIZE, 3), FOR, np.uint8)
        return await scorer.explain(fits), await scorer.explain(np.zeros((1, 8, 8, 3), np.uint8))

    seen, other = asyncio.run(ask())
    assert other is None and seen.digest == reference.sha256
    assert seen.maps.shape == (2, SIZE, SIZE) and seen.logits.shape == (2,)
    assert np.allclose(seen.maps.mean(axis=(1, 2)), seen.logits, atol=1e-4)


def test_nothing_larger_than_promised_is_sent(served):
    both = drawn(served, png(picture(2400, 200, (0, 0, 0.5, 0.5))), view="side_by_side")
    assert both.shape[1] == 2 * MAX_SIDE and both.shape[0] == 85
    narrow = explain(served, png(picture(4000, 9, (0, 0, 0.5, 1))), view="side_by_side").content
    assert cv2.imdecode(np.frombuffer(narrow, np.uint8), cv2.IMREAD_COLOR).shape == (2, 2048, 3)
