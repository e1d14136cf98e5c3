"""A check that was cut off goes on where it stopped, and says the same as one that was not."""

import os

import h5py
import numpy as np
import pandas as pd
import pytest

from data_pipelines import image_check
from data_pipelines.hdf5_index import build_index
from data_pipelines.image_check import check_images, kept_index
from data_pipelines.perceptual_hash import perceptual_hash, thumbnail
from data_pipelines.synthetic_lesions import LesionAppearance, encode_jpeg, render_lesion
from modeling.preprocessing import decode_image


@pytest.fixture
def images(tmp_path, monkeypatch):
    """20 pictures, two of them broken, checked in parts of 6."""
    monkeypatch.setattr(image_check, "PART_ROWS", 6)
    rng = np.random.default_rng(0)
    pictures = {f"ISIC_{i:02d}": encode_jpeg(render_lesion(LesionAppearance(), rng, 61 + i)) for i in range(20)}
    pictures["ISIC_03"] = b"no picture"
    pictures["ISIC_13"] = pictures["ISIC_13"][:500]
    path = tmp_path / "images.hdf5"
    with h5py.File(path, "w") as file:
        for key, data in pictures.items():
            file[key] = np.void(data)
    index = build_index(path)
    return str(path), pd.DataFrame({"id": index.ids, "offset": index.offset, "size": index.size}), pictures


def silent(done, total):
    pass


def test_broken_pictures_are_found_and_the_others_hashed(images, tmp_path):
    path, table, pictures = images
    seen = []
    check = check_images(path, table, tmp_path / "work", lambda done, total: seen.append((done, total)))
    assert set(check.failures) == {3, 13} and "truncated" in check.failures[13]
    assert check.hashes[3] == check.hashes[13] == 0
    decoded = decode_image(pictures["ISIC_07"])
    assert check.hashes[7] == perceptual_hash(thumbnail(decoded)[None])[0]
    assert seen[-1] == (20, 20) and sorted(seen) == seen


def test_an_interrupted_check_goes_on_with_the_parts_that_are_left(images, tmp_path, monkeypatch):
    path, table, _ = images
    whole = check_images(path, table, tmp_path / "whole", silent)
    decoded = []
    original = image_check._decode_part

    def interrupted(path, ids, offset, size, first_row):
        if len(decoded) == 2:
            raise KeyboardInterrupt
        decoded.append(first_row)
        return original(path, ids, offset, size, first_row)

    monkeypatch.setattr(image_check, "_decode_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_images(path, table, tmp_path / "work", silent, num_threads=1)
    # A part that was being written when the power failed.
    (tmp_path / "work" / f"decoded-12.npz.{os.getpid()}.tmp").write_bytes(b"half")
    monkeypatch.setattr(image_check, "_decode_part", lambda *call: decoded.append(call[-1]) or original(*call))
    resumed = check_images(path, table, tmp_path / "work", silent)
    assert sorted(decoded) == [0, 6, 12, 18]
    assert resumed.failures == whole.failures and np.array_equal(resumed.hashes, whole.hashes)


def test_the_index_is_built_once(images, tmp_path, monkeypatch):
    path, _, _ = images
    first = kept_index(path, tmp_path / "work", silent)
    monkeypatch.setattr(image_check, "build_index", lambda *_: pytest.fail("built again"))
    again = kept_index(path, tmp_path / "work", silent)
    for name in ("ids", "offset", "size"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
