"""A bundle opens as it was written and is refused once any of its bytes changed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modeling.bundle import load_bundle, write_manifest
from tests.tiny_bundle import EMBEDDING_DIM, SIZE, tiny_bundle


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", contexts=["image_only", "none"])


@pytest.fixture
def bundle(original, tmp_path):
    """A copy that a test may damage."""
    import shutil

    return load_bundle(shutil.copytree(original.directory, tmp_path / "tiny"), original.digest)


def test_everything_written_can_be_read(original):
    matrix, mean = original.projection()
    assert matrix.shape == (EMBEDDING_DIM, 64) and mean.shape == (EMBEDDING_DIM,)
    assert original.parity()["images"].shape == (16, SIZE, SIZE, 3)
    assert original.metrics("none")["gate"]["auc"]["value"] == 0.9
    assert {"group", "label", "risk", "risk_none"} <= set(original.reference().columns)
    assert original.task.malignant == ["malignant"]
    assert list(original.contexts) == ["image_only", "none"]


def test_context_models_predict_and_are_loaded_once(original):
    model = original.contexts["image_only"]
    probabilities = model.predict(np.log([[0.5, 0.5], [0.1, 0.9]]), None, None)
    assert probabilities.shape == (2, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert original.contexts["image_only"] is model
    with pytest.raises(KeyError):
        original.contexts["patient"]
    with pytest.raises(ValueError, match="no context 'patient'"):
        original.metrics("patient")


def test_local_path_and_file_uri_open_the_same_bundle(original):
    assert load_bundle(original.directory.as_uri(), original.digest).digest == original.digest


@pytest.mark.parametrize("name", ["image_scorer.onnx", "contexts/none/model.json", "model_card.md"])
def test_a_changed_byte_in_any_file_is_refused(bundle, name):
    path = bundle.directory / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} has sha256 .* refused"):
        load_bundle(bundle.directory)


def test_missing_and_unlisted_files_are_refused(bundle):
    extra = bundle.directory / "contexts" / "none" / "booster_99.txt"
    extra.write_text("tree")
    with pytest.raises(ValueError, match="booster_99.txt not in the manifest; refused"):
        load_bundle(bundle.directory)
    extra.unlink()
    (bundle.directory / "parity.npz").unlink()
    with pytest.raises(ValueError, match="parity.npz missing; refused"):
        load_bundle(bundle.directory)


def test_an_edited_manifest_is_refused_where_the_digest_is_known(bundle):
    path = bundle.directory / "manifest.json"
    path.write_text(path.read_text().replace('"backbone": "linear"', '"backbone": "other"'))
    with pytest.raises(ValueError, match="manifest.json has sha256 .* expected"):
        load_bundle(bundle.directory, bundle.digest)
    assert load_bundle(bundle.directory).digest != bundle.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"files": {"../../etc/passwd": "0" * 64}}, "not a plain relative path"),
        ({"files": {}}, "manifest lacks reference.parquet"),
    ],
)
def test_a_manifest_from_elsewhere_is_refused_in_one_line(bundle, change, message):
    path = bundle.directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_bundle(bundle.directory)
    assert "\n" not in str(caught.value)


def test_no_bundle_there(tmp_path):
    with pytest.raises(ValueError, match="no bundle at .*: manifest.json not found"):
        load_bundle(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no bundle at memory://nothing"):
        load_bundle("memory://nothing", cache_dir=tmp_path)


def test_an_incomplete_bundle_is_not_written(bundle):
    fields = bundle.manifest.model_dump(exclude={"files"})
    (bundle.directory / "manifest.json").unlink()
    (bundle.directory / "contexts" / "none" / "metrics.json").unlink()
    with pytest.raises(ValueError, match="lacks contexts/none/metrics.json"):
        write_manifest(bundle.directory, fields)
    assert not (bundle.directory / "manifest.json").exists()


def test_a_remote_bundle_is_fetched_once_and_verified(bundle, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(bundle.directory), "/models/tiny", recursive=True)
    cache = tmp_path / "cache"
    fetched = load_bundle("memory://models/tiny", bundle.digest, cache)
    assert fetched.digest == bundle.digest
    assert fetched.directory == cache / bundle.digest
    memory.rm("/models/tiny/image_scorer.onnx")
    assert load_bundle("memory://models/tiny", bundle.digest, cache).onnx_path.exists()

    memory.pipe_file("/models/tiny/image_scorer.onnx", b"not the model")
    with pytest.raises(ValueError, match="image_scorer.onnx has sha256"):
        load_bundle("memory://models/tiny", bundle.digest, tmp_path / "fresh")
    assert list((tmp_path / "fresh").iterdir()) == []
