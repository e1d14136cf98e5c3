"""The data source's read tasks, run in this process: what a batch holds, and what a bad picture does."""

import cv2
import h5py
import numpy as np
import pytest

from data_pipelines.augmentation import AugmentationConfig, build_augmentation
from data_pipelines.hdf5_datasource import (
    BLOCKS_PER_TASK,
    DecodeRecipe,
    ImageRows,
    LesionImageDatasource,
    _block_rows,
    _task_starts,
)
from data_pipelines.hdf5_index import build_index
from modeling.preprocessing import load_image


@pytest.fixture
def images(tmp_path):
    """An HDF5 of 20 noise pictures and its rows; the label is the picture's number."""
    path = tmp_path / "images.hdf5"
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for number in range(20):
            pixels = generator.integers(0, 255, (70 + number, 80, 3), dtype=np.uint8)
            file[f"ISIC_{number:04d}"] = np.bytes_(cv2.imencode(".jpg", pixels)[1].tobytes())
    index = build_index(path)
    return str(path), ImageRows(index.ids, index.offset, index.size, np.arange(20))


def read(source):
    tables = [table for task in source.get_read_tasks(1) for table in task()]
    columns = {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in ("row", "label", "epoch")}
    pictures = np.concatenate([table["image"].combine_chunks().to_numpy_ndarray() for table in tables])
    return columns | {"image": pictures}, tables


def test_every_row_comes_once_with_its_own_picture_and_label(images):
    path, rows = images
    columns, _ = read(LesionImageDatasource(path, rows, DecodeRecipe(32), rows_per_task=7, rows_per_block=3))
    assert sorted(columns["row"]) == list(range(20))
    assert np.array_equal(columns["row"], columns["label"])
    with h5py.File(path) as file:
        for position in (0, 11, 19):
            where = int(np.flatnonzero(columns["row"] == position)[0])
            expected = load_image(file[rows.ids[position]][()], 32)
            assert np.array_equal(columns["image"][where], expected)


def test_the_order_decides_rows_and_epoch_and_may_repeat(images):
    path, rows = images
    source = LesionImageDatasource(path, rows, DecodeRecipe(32), order=lambda: (3, np.array([5, 5, 1])))
    columns, _ = read(source)
    assert columns["row"].tolist() == [5, 5, 1]
    assert columns["epoch"].tolist() == [3, 3, 3]


def test_augmentation_is_seeded_by_epoch_and_differs_between_epochs(images):
    path, rows = images
    recipe = DecodeRecipe(32, AugmentationConfig(recipe="full"), seed=1)

    def epoch(number):
        return read(LesionImageDatasource(path, rows, recipe, order=lambda: (number, np.arange(20))))[0]["image"]

    assert np.array_equal(epoch(0), epoch(0))
    assert not np.array_equal(epoch(0), epoch(1))


@pytest.mark.parametrize("recipe", ["light", "full"])
def test_augmentation_keeps_shape_type_and_a_plausible_picture(recipe):
    image = np.full((64, 64, 3), 150, np.uint8)
    image[20:44, 20:44] = (90, 50, 40)
    augment = build_augmentation(AugmentationConfig(recipe=recipe), 64, seed=0)
    results = [augment(image) for _ in range(40)]
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    assert 90 < np.mean(results) < 180
    assert len({result.tobytes() for result in results}) > 20


def corrupt(path, rows, position):
    """Overwrites the middle of one picture's bytes and its end marker."""
    with open(path, "r+b") as file:
        file.seek(int(rows.offset[position]) + 4)
        file.write(b"\0" * (int(rows.size[position]) - 4))


def test_a_corrupt_picture_stops_training_with_its_id(images):
    path, rows = images
    corrupt(path, rows, 4)
    with pytest.raises(ValueError, match="ISIC_0004.*run prepare_dataset again"):
        read(LesionImageDatasource(path, rows, DecodeRecipe(32)))


def test_a_corrupt_picture_is_marked_when_scoring_and_the_others_are_untouched(images):
    path, rows = images
    corrupt(path, rows, 4)
    recipe = DecodeRecipe(32, mark_errors=True, with_quality=True)
    columns, tables = read(LesionImageDatasource(path, rows, recipe))
    errors = np.concatenate([table["error"].to_pylist() for table in tables])
    bad = np.flatnonzero(columns["row"] == 4)[0]
    assert errors[bad] and not any(error for i, error in enumerate(errors) if i != bad)
    assert columns["image"][bad].max() == 0
    brightness = np.concatenate([table["brightness"].to_numpy() for table in tables])
    assert np.isnan(brightness[bad]) and np.isfinite(np.delete(brightness, bad)).all()


def test_a_file_cut_short_names_the_image(images, tmp_path):
    path, rows = images
    data = open(path, "rb").read()
    last = int(np.argmax(rows.offset))
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes(data[: int(rows.offset[last]) + 10])
    with pytest.raises(ValueError, match=str(rows.ids[last])):
        read(LesionImageDatasource(str(cut), rows, DecodeRecipe(32)))


@pytest.mark.parametrize("num_rows", [1, 63, 64, 1000, 6424, 100_000, 401_059])
def test_tasks_cover_the_rows_in_whole_blocks_and_the_last_ones_are_small(num_rows):
    block = _block_rows(num_rows, 128)
    starts = _task_starts(num_rows, BLOCKS_PER_TASK * block, block)
    sizes = np.diff([*starts, num_rows])
    assert starts[0] == 0 and sizes.min() > 0 and sizes.max() <= BLOCKS_PER_TASK * block
    assert all(size % block == 0 for size in sizes[:-1]) and sizes[-1] <= block
    assert len(starts) >= min(4, num_rows // 64)
    # A block is what Ray Data moves at once: never more than 24 MiB, whatever the input size.
    for side in (32, 128, 224, 512, 1024):
        assert _block_rows(num_rows, side) * side**2 * 3 <= 24 * 2**20
