"""Whatever layout the HDF5 file has, every image comes back byte for byte, and a broken file says so in one line."""

import h5py
import numpy as np
import pytest

from data_pipelines.hdf5_index import build_index
from data_pipelines.image_reader import ImageReader, as_bytes
from data_pipelines.synthetic_lesions import LesionAppearance, encode_jpeg, render_lesion


@pytest.fixture(scope="module")
def jpegs():
    rng = np.random.default_rng(3)
    return {f"ISIC_{i:07d}": encode_jpeg(render_lesion(LesionAppearance(), rng, 61 + 2 * i)) for i in range(4)}


def as_uint8(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


# layout -> (how one image is written, whether its bytes can be read without h5py)
LAYOUTS = {
    "fixed string": (lambda file, key, data: file.create_dataset(key, data=np.bytes_(data)), True),
    "padded string": (lambda file, key, data: file.create_dataset(key, data=np.array(data, "S20000")), True),
    "void": (lambda file, key, data: file.create_dataset(key, data=np.void(data)), True),
    "uint8 array": (lambda file, key, data: file.create_dataset(key, data=as_uint8(data)), True),
    "chunked": (lambda file, key, data: file.create_dataset(key, data=as_uint8(data), chunks=(512,)), False),
    "compressed": (lambda file, key, data: file.create_dataset(key, data=as_uint8(data), compression="gzip"), False),
    "variable length": (
        lambda file, key, data: file.create_dataset(key, (), h5py.vlen_dtype(np.uint8)).__setitem__((), as_uint8(data)),
        False,
    ),
}


def read_all(path) -> dict[str, bytes]:
    index = build_index(path)
    with ImageReader(path) as reader:
        return {
            str(i): reader.read(str(i), int(offset), int(size))
            for i, offset, size in zip(index.ids, index.offset, index.size, strict=True)
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bytes_as_were_put_in(layout, jpegs, tmp_path):
    write, contiguous = LAYOUTS[layout]
    with h5py.File(tmp_path / "images.hdf5", "w") as file:
        for key, data in jpegs.items():
            write(file, key, data)
    assert read_all(tmp_path / "images.hdf5") == jpegs
    assert (build_index(tmp_path / "images.hdf5").offset >= 0).all() == contiguous


def test_bytes_behind_a_user_block_are_found(jpegs, tmp_path):
    with h5py.File(tmp_path / "images.hdf5", "w", userblock_size=1024) as file:
        for key, data in jpegs.items():
            file.create_dataset(key, data=np.bytes_(data))
    assert read_all(tmp_path / "images.hdf5") == jpegs


def test_the_index_is_sorted_by_id_and_skips_groups(jpegs, tmp_path):
    with h5py.File(tmp_path / "images.hdf5", "w", track_order=True) as file:
        for key in reversed(jpegs):
            file.create_dataset(key, data=np.bytes_(jpegs[key]))
        file.create_group("extras").create_dataset("x", data=1)
    assert build_index(tmp_path / "images.hdf5").ids.tolist() == sorted(jpegs)


def test_a_damaged_entry_costs_itself_only(jpegs, tmp_path):
    path = tmp_path / "images.hdf5"
    with h5py.File(path, "w") as file:
        for key, data in jpegs.items():
            file.create_dataset(key, data=np.bytes_(data))
        # The first entry's object header: two zeroed blocks make h5py unable to open it.
        header = h5py.h5o.get_info(file["ISIC_0000001"].id).addr
    with open(path, "r+b") as file:
        file.seek(header)
        file.write(b"\0" * 32)
    index = build_index(path)
    assert index.ids.tolist() == sorted(jpegs)
    with ImageReader(path) as reader:
        for key, offset, size in zip(index.ids.tolist(), index.offset, index.size, strict=True):
            if key == "ISIC_0000001":
                with pytest.raises((OSError, KeyError)):
                    reader.read(key, int(offset), int(size))
            else:
                assert reader.read(key, int(offset), int(size)) == jpegs[key]


def test_bytes_past_the_end_of_the_file_are_an_error_and_not_half_a_picture(jpegs, tmp_path):
    path = tmp_path / "images.hdf5"
    with h5py.File(path, "w") as file:
        for key, data in jpegs.items():
            file.create_dataset(key, data=np.bytes_(data))
    index = build_index(path)
    last = int(np.argmax(index.offset))
    with open(path, "r+b") as file:
        file.truncate(int(index.offset[last] + index.size[last] // 2))
    with ImageReader(path) as reader, pytest.raises(OSError, match="bytes at offset"):
        reader.read(str(index.ids[last]), int(index.offset[last]), int(index.size[last]))


def test_broken_files_are_one_clear_line(jpegs, tmp_path):
    whole = tmp_path / "whole.hdf5"
    with h5py.File(whole, "w") as file:
        for key, data in jpegs.items():
            file.create_dataset(key, data=np.bytes_(data))
    (tmp_path / "truncated.hdf5").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "text.hdf5").write_text("not HDF5")
    (tmp_path / "empty.hdf5").write_bytes(b"")
    with h5py.File(tmp_path / "nothing.hdf5", "w") as file:
        file.create_group("images")
    for name, says in {
        "truncated.hdf5": "cannot be read as HDF5",
        "text.hdf5": "cannot be read as HDF5",
        "empty.hdf5": "cannot be read as HDF5",
        "absent.hdf5": "does not exist",
        "nothing.hdf5": "holds no datasets",
        ".": "is a folder",
    }.items():
        with pytest.raises(ValueError, match=says) as error:
            build_index(tmp_path / name)
        assert "\n" not in str(error.value)


def test_only_a_jpeg_loses_trailing_nuls():
    assert as_bytes(b"\xff\xd8...\xff\xd9\0\0") == b"\xff\xd8...\xff\xd9"
    assert as_bytes(b"RIFF....WEBP\0") == b"RIFF....WEBP\0"
