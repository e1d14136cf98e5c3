"""A lesion's fields are checked one by one, and each refusal names its field."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from modeling.preprocessing import image_quality, load_image
from serve.errors import ApiError
from serve.lesion import (
    keyed_id,
    parse_acquired_at,
    parse_json,
    parse_key,
    parse_metadata,
    parse_text,
    prepare,
)
from serve.settings import UploadLimits
from store.tables import now_us
from tests.bundle_factory import lesion_image
from tests.tiny_bundle import tiny_task

TASK = tiny_task()


def refusal(function, *arguments) -> ApiError:
    with pytest.raises(ApiError) as caught:
        function(*arguments)
    assert "\n" not in caught.value.detail
    return caught.value


def test_serving_sees_the_picture_exactly_as_training_does():
    data = lesion_image(3, size=100)
    prepared = prepare(data, 32, UploadLimits())
    assert np.array_equal(prepared.pixels, load_image(data, 32))
    assert prepared.quality == image_quality(load_image(data, 100))


def test_kept_bytes_have_no_metadata_and_decode_to_the_same_pixels():
    jpeg = lesion_image(1)
    comment = b"\xff\xfe\x00\x0fpatient Jane\0"
    with_comment = jpeg[:2] + comment + jpeg[2:]
    kept = prepare(with_comment, 32, UploadLimits()).stored
    assert b"Jane" not in kept.data and kept.suffix == ".jpg"
    assert np.array_equal(load_image(kept.data, 32), load_image(jpeg, 32))
    webp = prepare(lesion_image(1, suffix=".webp"), 32, UploadLimits()).stored
    assert webp.suffix == ".png"


@pytest.mark.parametrize(
    "data",
    [
        lesion_image()[: len(lesion_image()) // 2],
        lesion_image(suffix=".png")[:200],
        lesion_image(suffix=".webp")[:100],
        cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes(),
    ],
    ids=["truncated jpeg", "truncated png", "truncated webp", "4 pixels"],
)
def test_a_picture_that_does_not_decode_is_422(data):
    error = refusal(prepare, data, 32, UploadLimits())
    assert (error.status, error.error) == (422, "undecodable_image")
    assert error.detail.startswith("image: ")


@pytest.mark.parametrize("text", ["{", "", "NaN", '{"age_approx": Infinity}', "[" * 100_000, "9" * 5000, "\ud800"])
def test_json_that_is_none_is_422_naming_the_field(text):
    error = refusal(parse_json, text, "metadata")
    assert error.status == 422 and error.detail.startswith("metadata: ")


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ([], "metadata"),
        ("text", "metadata"),
        (7, "metadata"),
        ({"agee": 5}, "agee"),
        ({"age_approx": "60"}, "age_approx"),
        ({"age_approx": -1}, "age_approx"),
        ({"age_approx": 10**400}, "age_approx"),
        ({"age_approx": True}, "age_approx"),
        ({"age_approx": [60]}, "age_approx"),
        ({"sex": 1}, "sex"),
        ({"sex": {"a": 1}}, "sex"),
        ({"sex": "x" * 10_000}, "sex"),
        ({"sex": "fe\0male"}, "sex"),
        ({"sex": "\ud83d"}, "sex"),
    ],
)
def test_wrong_metadata_is_422_naming_field_and_value(metadata, field):
    error = refusal(parse_metadata, metadata, TASK)
    assert error.status == 422 and field in error.detail


def test_metadata_is_completed_and_absent_stays_absent():
    assert parse_metadata(None, TASK) is None
    assert parse_metadata({"age_approx": 60}, TASK) == {"age_approx": 60.0, "sex": None}


def test_times_are_microseconds_utc():
    assert parse_acquired_at("1970-01-02T00:00:00Z") == 86_400_000_000
    assert parse_acquired_at("1970-01-02T02:00:00+02:00") == 86_400_000_000
    assert parse_acquired_at("1970-01-02") == 86_400_000_000
    assert parse_acquired_at(None) is None and parse_acquired_at(" ") is None


@pytest.mark.parametrize("text", ["yesterday", "0001-01-01", "9999-12-31T23:59:59", "12", "2024-13-01", "1969-12-31"])
def test_times_that_cannot_be_are_refused(text):
    assert refusal(parse_acquired_at, text).detail.startswith("acquired_at: ")
    assert parse_acquired_at("2024-05-01T09:30:00Z") < now_us()


def test_text_fields_are_short_and_printable():
    assert parse_text("  St. Anna\u2019s ", "institution") == "St. Anna\u2019s"
    assert parse_text("", "device") is None
    for text in ("x" * 256, "a\nb", "a\0b", "\udfff"):
        assert refusal(parse_text, text, "device").detail.startswith("device: ")


def test_keys_are_visible_ascii_and_give_one_id_each():
    assert parse_key("a-1") == "a-1"
    for key in ("", "a b", "\u00e4", "x" * 201):
        assert "Idempotency-Key" in refusal(parse_key, key).detail
    assert keyed_id("clinic", "1") == keyed_id("clinic", "1")
    assert len({keyed_id("clinic", "1"), keyed_id("clinic", "2"), keyed_id("clinic2", "1")}) == 3
