"""Many images at once: from a local file and from a real S3 server, with as few requests as their distances allow."""

import h5py
import numpy as np
import pytest

from data_pipelines import image_reader
from data_pipelines.hdf5_index import build_index, images_bytes, images_state
from data_pipelines.image_reader import ImageReader

BUCKET = "lesions"


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return {f"ISIC_{i:07d}": rng.bytes(int(rng.integers(400, 4000))) + b"\x01" for i in range(60)}


@pytest.fixture(scope="module")
def local(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "train-image.hdf5"
    with h5py.File(path, "w") as file:
        for key, data in pictures.items():
            file.create_dataset(key, data=np.void(data))
        # One that has no byte range of its own.
        compressed = np.frombuffer(pictures["ISIC_0000007"], np.uint8)
        del file["ISIC_0000007"]
        file.create_dataset("ISIC_0000007", data=compressed, compression="gzip")
    return str(path)


@pytest.fixture(scope="module")
def s3():
    """A real S3 server on a free port of this host; its address reaches clients through the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        filesystem = s3fs.S3FileSystem()
        filesystem.mkdir(BUCKET)
        yield filesystem
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def remote(s3, local):
    s3.put(local, f"{BUCKET}/train-image.hdf5")
    return f"s3://{BUCKET}/train-image.hdf5"


def shuffled(index, seed=0):
    """Rows in random order, some of them twice, as an epoch draws them."""
    order = np.random.default_rng(seed).integers(0, len(index.ids), 100)
    return index.ids[order], index.offset[order], index.size[order]


def test_an_object_that_is_replaced_by_another_of_its_size_is_noticed(s3):
    url = f"s3://{BUCKET}/replaced.hdf5"
    s3.pipe(url, b"first")
    first = images_state(url)
    assert images_state(url) == first
    s3.pipe(url, b"other")
    assert images_bytes(url) == 5 and images_state(url) != first
    with pytest.raises(ValueError, match="replaced.hdf4 does not exist"):
        images_state(url.replace("hdf5", "hdf4"))


@pytest.mark.parametrize("where", ["local", "remote"])
def test_images_come_in_the_order_asked_for(where, request, pictures):
    path = request.getfixturevalue(where)
    index = build_index(path)
    assert index.ids.tolist() == sorted(pictures)
    assert images_bytes(path) == images_bytes(request.getfixturevalue("local"))
    ids, offset, size = shuffled(index)
    assert (offset < 0).any() and (offset >= 0).any()
    with ImageReader(path) as reader:
        assert reader.read_many(ids, offset, size) == [pictures[i] for i in ids]
        assert reader.read(str(ids[0]), int(offset[0]), int(size[0])) == pictures[ids[0]]


def test_near_ranges_are_one_request_and_far_ones_are_not(remote, pictures, monkeypatch):
    index = build_index(remote)
    ranged = index.offset >= 0
    ids, offset, size = (values[ranged] for values in (index.ids, index.offset, index.size))
    requests = count_requests(monkeypatch)
    with ImageReader(remote) as reader:
        assert reader.read_many(ids, offset, size) == [pictures[i] for i in ids]
        assert len(requests) == 1
        monkeypatch.setattr(image_reader, "MAX_GAP_BYTES", -1)
        assert reader.read_many(ids, offset, size) == [pictures[i] for i in ids]
        assert len(requests) == 1 + len(ids)
        monkeypatch.setattr(image_reader, "MAX_GAP_BYTES", 10**6)
        monkeypatch.setattr(image_reader, "MAX_REQUEST_BYTES", 20_000)
        assert reader.read_many(ids, offset, size) == [pictures[i] for i in ids]
    merged = requests[1 + len(ids) :]
    assert 3 < len(merged) < len(ids) and max(end - start for start, end in merged) <= 20_000


def count_requests(monkeypatch) -> list[tuple[int, int]]:
    """The (start, end) of every range that readers ask the store for from now on."""
    requests = []
    original = image_reader.fsspec.core.url_to_fs

    class Counting:
        def __init__(self, filesystem):
            self.filesystem = filesystem

        def cat_ranges(self, paths, starts, ends, **options):
            requests.extend(zip(starts, ends, strict=True))
            return self.filesystem.cat_ranges(paths, starts, ends, **options)

    def url_to_fs(url):
        filesystem, key = original(url)
        return Counting(filesystem), key

    monkeypatch.setattr(image_reader.fsspec.core, "url_to_fs", url_to_fs)
    return requests


@pytest.mark.parametrize("where", ["local", "remote"])
def test_bytes_that_are_not_there_cost_only_their_own_picture(where, request, pictures):
    path = request.getfixturevalue(where)
    index = build_index(path)
    ids, offset, size = index.ids[:3].copy(), index.offset[:3].copy(), index.size[:3].copy()
    offset[1] = images_bytes(path) + 2**24
    with ImageReader(path) as reader:
        first, second, third = reader.read_many(ids, offset, size)
        assert (first, third) == (pictures[ids[0]], pictures[ids[2]])
        assert isinstance(second, OSError)
        with pytest.raises(OSError):
            reader.read(str(ids[1]), int(offset[1]), int(size[1]))


def test_windows_give_every_row_once_and_hold_a_bounded_number_of_bytes(local, pictures, monkeypatch):
    index = build_index(local)
    ids, offset, size = shuffled(index)
    monkeypatch.setattr(image_reader, "MAX_WINDOW_BYTES", 20_000)
    seen = []
    with ImageReader(local) as reader:
        for first, encoded in reader.windows(ids, offset, size, rows=16):
            assert first == len(seen) and len(encoded) <= 16
            assert sum(map(len, encoded)) <= 20_000
            seen += encoded
    assert seen == [pictures[i] for i in ids]


def test_windows_of_nothing_are_nothing(local):
    empty = np.empty(0, np.int64)
    with ImageReader(local) as reader:
        assert list(reader.windows(np.empty(0, "U9"), empty, empty, rows=4)) == []


def test_a_remote_file_that_is_absent_or_not_hdf5_is_one_clear_line(s3):
    with pytest.raises(ValueError, match="images file s3://lesions/none.hdf5 does not exist"):
        build_index("s3://lesions/none.hdf5")
    s3.pipe(f"{BUCKET}/text.hdf5", b"not HDF5" * 400)
    with pytest.raises(ValueError, match="images file s3://lesions/text.hdf5 cannot be read as HDF5") as error:
        build_index("s3://lesions/text.hdf5")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="images file nosuch://x/y.hdf5"):
        build_index("nosuch://x/y.hdf5")


def test_a_dataset_version_is_prepared_and_read_from_an_object_store(s3, tmp_path):
    from data_pipelines.dataset_version import SplitSettings, prepare_version
    from data_pipelines.hdf5_datasource import DecodeRecipe, LesionImageDatasource
    from data_pipelines.image_dataset import open_dataset
    from data_pipelines.synthetic_dataset import SHIFTS, write_sample
    from ray_jobs.job import REPO_ROOT, parse_config
    from ray_jobs.prepare_dataset import PrepareDatasetConfig

    write_sample(tmp_path / "sample", 24, 4.0, 0.3, 0, SHIFTS["none"], lambda line: None)
    s3.put(str(tmp_path / "sample/train-image.hdf5"), f"{BUCKET}/sample.hdf5")
    task = parse_config(PrepareDatasetConfig, [], REPO_ROOT / "configs/prepare_dataset.yaml").task
    versions = {}
    for where in (f"s3://{BUCKET}/sample.hdf5", str(tmp_path / "sample/train-image.hdf5")):
        result = prepare_version(
            where,
            str(tmp_path / "sample/train-metadata.csv"),
            str(tmp_path / f"out{len(versions)}"),
            task,
            SplitSettings(2, 0.2, 0),
            True,
            lambda line: None,
        )
        version = versions[where] = open_dataset(result["dataset"])
        assert version.images_path == where
    remote, local = versions.values()
    # The same bytes are the same version, wherever they lie.
    assert remote.digest == local.digest and remote.lesions.equals(local.lesions)
    pixels = []
    for version in (remote, local):
        source = LesionImageDatasource(version.images_path, version.rows(version.training_positions), DecodeRecipe(32))
        tables = [table for task_ in source.get_read_tasks(1) for table in task_()]
        pixels.append(np.concatenate([table["image"].combine_chunks().to_numpy_ndarray() for table in tables]))
    assert np.array_equal(*pixels) and len(pixels[0]) == len(local.training_positions)
