"""A sweep removes pictures that no row names, and nothing that somebody may still need."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sql

from store import image_sweep
from store.database import StoreUnavailableError, open_store
from store.image_files import ImageFiles
from store.image_sweep import ImageSweep, sweep_images
from store.submissions import insert_submission
from store.tables import images
from tests.log_rows import prediction_row

AGE_S = 3600.0


def data_of(name: str) -> bytes:
    return b"\xff\xd8 picture " + name.encode()


def hash_of(name: str) -> str:
    return hashlib.sha256(data_of(name)).hexdigest()


def image_row(name: str) -> dict:
    return {"hash": hash_of(name), "suffix": ".jpg", "num_bytes": len(data_of(name)), "stored_at": 1}


class Place:
    """A store and its images."""

    def __init__(self, url: str, folder: Path):
        self.store = open_store(url)
        self.folder = folder
        self.files = ImageFiles(str(folder))

    def put(self, name: str, age_s: float = 2 * AGE_S) -> Path:
        """Writes a picture of this age."""
        self.files.put(data_of(name))
        return self.aged(Path(self.files.path(hash_of(name), ".jpg")), age_s)

    def aged(self, path: Path, age_s: float = 2 * AGE_S) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(b"something")
        os.utime(path, (time.time() - age_s,) * 2)
        return path

    def predict(self, name: str, **values) -> None:
        row = prediction_row(f"of {name}", image_hash=hash_of(name), **values)
        self.store.insert_predictions([row], [image_row(name)])

    def submit(self, name: str) -> None:
        request = {"image_hash": hash_of(name), "image_suffix": ".jpg", "patient_hmac": None, "metadata": None}
        insert_submission(self.store, "clinic", name, request, image_row(name), 100)

    def rows(self) -> set[str]:
        with self.store.reading() as connection:
            return set(connection.execute(sql.select(images.c.hash)).scalars())

    def sweep(self, **options) -> ImageSweep:
        return sweep_images(self.store, self.files, AGE_S, **options)


@pytest.fixture
def place(any_store_url, tmp_path):
    made = Place(any_store_url, tmp_path / "images")
    yield made
    made.store.close()


@pytest.fixture
def local(tmp_path):
    made = Place(f"sqlite:///{tmp_path}/store.db", tmp_path / "images")
    yield made
    made.store.close()


def test_what_a_prediction_or_a_submission_names_stays_and_what_nothing_names_goes(place):
    kept = [place.put("predicted"), place.put("submitted"), place.put("both"), place.put("young", 60)]
    gone = place.put("unnamed")
    place.predict("predicted")
    place.submit("submitted")
    place.predict("both")
    place.submit("both")
    assert place.sweep() == ImageSweep(looked_at=4, images=1)
    assert all(path.exists() for path in kept) and not gone.exists()
    assert place.sweep() == ImageSweep(looked_at=3)
    assert place.rows() == {hash_of(name) for name in ("predicted", "submitted", "both")}


def test_a_picture_that_came_second_under_a_key_goes_with_its_row(place):
    """Its row of `images` is written, its prediction is not: the key stands for the first."""
    first, second = place.put("first"), place.put("second")
    place.predict("first", idempotency_key="visit-1")
    place.predict("second", idempotency_key="visit-1")
    assert place.rows() == {hash_of("first"), hash_of("second")}
    assert place.sweep().images == 1
    assert first.exists() and not second.exists()
    assert place.rows() == {hash_of("first")}


def test_files_of_writes_that_never_ended_go_when_they_are_old(local):
    local.predict("named")
    picture = local.put("named")
    old, other = (local.aged(picture.with_name(f".{picture.name}.{letter * 32}.tmp")) for letter in "ab")
    young = local.aged(picture.with_name(f".{picture.name}.{'c' * 32}.tmp"), 60)
    alone = local.aged(local.folder / "ab" / f".{'ab' * 32}.png.{'d' * 32}.tmp")
    assert local.sweep() == ImageSweep(looked_at=1, unfinished=3)
    assert picture.exists() and young.exists()
    assert not any(path.exists() for path in (old, other, alone))


@pytest.mark.parametrize(
    "name",
    [
        "ab/notes.txt",
        f"ab/{'ab' * 32}.jpeg",
        f"ab/{'ab' * 32}.jpg.bak",
        f"ab/{'AB' * 32}.jpg",
        f"ab/{'cd' * 32}.jpg",  # not where it would be looked for
        f"ab/.{'ab' * 32}.jpg.tmp",
        f"ab/.notes.{'a' * 32}.tmp",
        f"{'ab' * 32}.jpg",
        f"xy/{'ab' * 32}.jpg",
        f"ab/ab/{'ab' * 32}.jpg",
        f"ab/{'ab' * 32}.png/inside",  # a folder with a picture's name
    ],
)
def test_files_of_others_are_left_alone(local, name):
    path = local.aged(local.folder / name)
    local.aged(path.parent)
    assert local.sweep() == ImageSweep()
    assert path.exists()


@pytest.mark.parametrize("with_row", [True, False])
def test_one_that_is_named_between_the_look_and_the_removal_stays(local, monkeypatch, with_row):
    picture, unnamed = local.put("named late"), local.put("unnamed")
    remove_unused, looked = image_sweep.remove_unused, []

    def after_a_commit(store, files, names):
        looked.extend(names)
        if hash_of("named late") in names:
            row = prediction_row("late", image_hash=hash_of("named late"))
            store.insert_predictions([row], [image_row("named late")] if with_row else [])
        return remove_unused(store, files, names)

    monkeypatch.setattr(image_sweep, "remove_unused", after_a_commit)
    assert local.sweep().images == 1
    assert sorted(looked) == sorted([hash_of("named late"), hash_of("unnamed")])
    assert picture.exists() and not unnamed.exists()
    assert local.rows() == ({hash_of("named late")} if with_row else set())


def test_the_removal_waits_for_a_commit_under_way(local, monkeypatch):
    """Between a picture, which was there, and its row: the commit relies on the file."""
    picture = local.put("named")
    remove_unused, begins = image_sweep.remove_unused, threading.Event()

    def told(*arguments):
        begins.set()
        return remove_unused(*arguments)

    monkeypatch.setattr(image_sweep, "remove_unused", told)
    sweeps = threading.Thread(target=local.sweep)
    with local.files.locked():
        sweeps.start()
        assert begins.wait(30)
        sweeps.join(0.3)
        assert sweeps.is_alive() and picture.exists()
        local.predict("named")
    sweeps.join(30)
    assert not sweeps.is_alive() and picture.exists()


def test_many_are_removed_a_few_at_a_time(local, monkeypatch):
    """The exclusive lock keeps commits waiting; named ones never take it."""
    for number in range(6):
        local.put(f"unnamed {number}")
        local.put(f"named {number}")
        local.predict(f"named {number}")
    monkeypatch.setattr(image_sweep, "_REMOVED", 2)
    remove_unused, calls = image_sweep.remove_unused, []

    def counted(store, files, names):
        calls.append(list(names))
        return remove_unused(store, files, names)

    monkeypatch.setattr(image_sweep, "remove_unused", counted)
    # All in one folder, as among millions.
    monkeypatch.setattr(image_sweep, "_old_files", self_listing(local))
    assert local.sweep().images == 6
    assert [len(names) for names in calls] == [2, 2, 2]
    assert {name for names in calls for name in names} == {hash_of(f"unnamed {number}") for number in range(6)}


def self_listing(place: Place):
    def old_files(folder, _written_before):
        first = min(place.folder.iterdir())
        return sorted(path.stem for path in place.folder.rglob("*.jpg")) if folder == first else [], []

    return old_files


def test_one_that_cannot_be_removed_keeps_no_other(local, monkeypatch):
    stuck, others = local.put("stuck"), [local.put(f"unnamed {number}") for number in range(5)]
    remove = local.files.remove

    def fails_for_one(image_hash):
        if image_hash == hash_of("stuck"):
            raise OSError("read-only file system")
        return remove(image_hash)

    monkeypatch.setattr(local.files, "remove", fails_for_one)
    monkeypatch.setattr(image_sweep, "_old_files", self_listing(local))
    sweep = local.sweep()
    assert (sweep.failures, sweep.first_failure) == (1, "read-only file system")
    assert stuck.exists() and not any(path.exists() for path in others)


def test_a_folder_that_cannot_be_listed_is_told_and_keeps_no_other(local, monkeypatch):
    unnamed = local.put("unnamed")
    broken = local.folder / ("00" if unnamed.parent.name != "00" else "01")
    broken.mkdir()
    scandir = os.scandir

    def fails_for_one(folder):
        if Path(folder) == broken:
            raise OSError(5, "Input/output error", str(folder))
        return scandir(folder)

    monkeypatch.setattr(image_sweep.os, "scandir", fails_for_one)
    sweep = local.sweep()
    assert sweep.images == 1 and sweep.failures == 1 and str(broken) in sweep.first_failure
    assert not unnamed.exists()


def test_a_database_that_goes_away_ends_the_sweep_which_may_be_run_again(local, monkeypatch):
    pictures = [local.put(f"unnamed {number}") for number in range(4)]
    remove_unused = image_sweep.remove_unused
    calls = []

    def away(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise StoreUnavailableError("locked")
        return remove_unused(*arguments)

    monkeypatch.setattr(image_sweep, "remove_unused", away)
    monkeypatch.setattr(image_sweep, "_REMOVED", 1)
    with pytest.raises(StoreUnavailableError):
        local.sweep()
    assert sum(path.exists() for path in pictures) == 3
    assert local.sweep().images == 3


def test_a_store_that_knows_next_to_none_of_the_pictures_is_taken_for_the_wrong_one(local):
    """An empty database, by a mistyped `store_url` or after a loss, must not cost every picture."""
    pictures = [local.put(f"of another store {number}") for number in range(104)]
    local.predict("known")
    with pytest.raises(ValueError, match="holds 104 pictures, but store .* knows of 1; expected at most 2 times"):
        local.sweep()
    assert all(path.exists() for path in pictures)
    local.predict("also known")
    assert local.sweep().images == 104


def test_it_ends_where_it_is_told_to(local):
    unnamed = local.put("unnamed")
    calls = []

    def end_after(number):
        calls.clear()
        return lambda: calls.append(None) or len(calls) > number

    # While the files are counted, before the folder, and before the look into the database.
    for number in range(3):
        assert local.sweep(pause=end_after(number)).images == 0 and len(calls) == number + 1
    assert unnamed.exists()
    assert local.sweep(pause=end_after(3)).images == 1


def test_the_age_is_told_by_the_given_clock(local):
    picture = local.put("unnamed", 0)
    assert local.sweep(clock=lambda: time.time() + AGE_S - 60).images == 0
    assert local.sweep(clock=lambda: time.time() + AGE_S + 60).images == 1
    assert not picture.exists()


def test_a_bucket_is_left_alone(local):
    files = ImageFiles(f"file-bucket://{local.folder}")
    assert not files.local
    files.url = str(local.folder)
    picture = local.put("unnamed")
    assert sweep_images(local.store, files, AGE_S) == ImageSweep()
    assert picture.exists()


def test_a_service_without_pictures_has_nothing_to_sweep(local):
    assert local.sweep() == ImageSweep()
    assert not local.folder.exists()
