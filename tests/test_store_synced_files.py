"""Files are on disk, whole, when the call returns; many of them with two syncs, where the file system allows that."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from store import synced_files
from store.synced_files import SyncedFolders, temporary_files, unfinished_folder


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def syncs(monkeypatch):
    """What lies below the root at every sync, by name; `syncs.at(n)` is called at the n-th."""
    found = SimpleNamespace(states=[], synced=[], at=lambda number: None)
    fsync = os.fsync

    def syncfs(descriptor):
        root = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        files = {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        found.states.append(files)
        found.at(len(found.states))

    def one(descriptor):
        found.synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(synced_files, "_syncfs", syncfs)
    monkeypatch.setattr(synced_files, "_syncs_as_a_whole", lambda _: True)
    monkeypatch.setattr(synced_files.os, "fsync", one)
    return found


def files(root, *names):
    return [(root / name[:2] / name, name.encode() * 100) for name in names]


def names(root):
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_files_have_their_names_only_once_their_content_is_on_disk(tmp_path, syncs):
    root = tmp_path / "images"
    given = files(root, "aa1", "aa2", "bb1")
    SyncedFolders(root).write(given)
    before, after = syncs.states
    assert sorted(before.values()) == sorted(data for _, data in given)
    assert all(name.startswith(".") and name.endswith(".tmp") for name in before)
    assert after == {path.name: data for path, data in given}
    # The root's own name, and one that says whether the file system still takes anything.
    assert syncs.synced == [tmp_path.name, "aa1"]


def test_what_is_there_is_not_written_again_but_its_name_is_made_durable(tmp_path, syncs):
    """Who renamed it may not have lived to sync its folder."""
    folders = SyncedFolders(tmp_path)
    folders.write(files(tmp_path, "aa1", "aa2"))
    times = [path.stat().st_mtime_ns for path, _ in files(tmp_path, "aa1", "aa2")]
    syncs.states.clear()
    folders.write(files(tmp_path, "aa1", "aa2", "aa1"))
    assert [path.stat().st_mtime_ns for path, _ in files(tmp_path, "aa1", "aa2")] == times
    assert len(syncs.states) == 1


@pytest.mark.parametrize("failing", [1, 2])
def test_where_a_sync_fails_each_file_is_written_and_synced_by_itself(tmp_path, syncs, failing):
    """It may be another program's file that cannot be written. And what has its name already may not be durable."""

    def fail(number):
        if number == failing:
            raise synced_files._SyncFailedError(errno.EIO, "Input/output error")

    syncs.at = fail
    given = files(tmp_path, "aa1", "bb1")
    folders = SyncedFolders(tmp_path)
    folders.write(given)
    assert {name.split(".")[1] for name in syncs.synced if name.endswith(".tmp")} == {"aa1", "bb1"}
    assert names(tmp_path) == ["aa1", "bb1"]
    folders.write(files(tmp_path, "cc1", "cc2"))
    assert len(syncs.states) == failing and names(tmp_path)[-2:] == ["cc1", "cc2"]


def test_files_that_cannot_be_synced_either_way_are_told_and_leave_no_temporary_file(tmp_path, syncs, monkeypatch):
    def fail(_):
        raise synced_files._SyncFailedError(errno.EIO, "Input/output error")

    syncs.at = fail
    monkeypatch.setattr(synced_files.os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        SyncedFolders(tmp_path).write(files(tmp_path, "aa1", "bb1"))
    assert names(tmp_path) == []


def test_a_file_system_that_was_made_read_only_meanwhile_is_told(tmp_path, syncs, monkeypatch):
    """syncfs succeeds there, having nothing to do."""

    def read_only(descriptor):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(synced_files.os, "fsync", read_only)
    with pytest.raises(OSError, match="Read-only"):
        SyncedFolders(tmp_path).write(files(tmp_path, "aa1", "bb1"))
    assert len(syncs.states) == 2


def test_what_others_have_written_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(synced_files, "_device_syncs_as_a_whole", lambda *_: True)
    assert synced_files._dirty_bytes() > 0
    for dirty, waits in ((2**20, True), (2**30, False)):
        monkeypatch.setattr(synced_files, "_dirty_bytes", lambda dirty=dirty: dirty)
        assert synced_files._syncs_as_a_whole(tmp_path) is waits


def test_a_disk_that_is_full_at_the_third_leaves_nothing(tmp_path, syncs, monkeypatch):
    write, written = os.write, []

    def full(descriptor, data):
        written.append(descriptor)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(synced_files.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        SyncedFolders(tmp_path).write(files(tmp_path, "aa1", "aa2", "aa3"))
    assert names(tmp_path) == [] and syncs.states == []


def test_a_write_that_takes_a_part_of_the_data_is_continued(tmp_path, syncs, monkeypatch):
    write = os.write
    monkeypatch.setattr(synced_files.os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    given = files(tmp_path, "aa1", "aa2")
    SyncedFolders(tmp_path).write(given)
    assert [path.read_bytes() for path, _ in given] == [data for _, data in given]


def test_one_file_is_synced_by_itself(tmp_path, syncs):
    SyncedFolders(tmp_path).write(files(tmp_path, "aa1"))
    assert syncs.states == []
    assert syncs.synced[0].startswith(".aa1.") and set(syncs.synced[1:]) == {"aa", tmp_path.name}


def test_a_file_system_that_others_keep_busy_is_left_alone_for_a_while(tmp_path, syncs, clock):
    folders = SyncedFolders(tmp_path, clock)

    def slow(number):
        clock.now += 2.0

    syncs.at = slow
    folders.write(files(tmp_path, "aa1", "aa2"))
    assert len(syncs.states) == 2
    folders.write(files(tmp_path, "bb1", "bb2"))
    assert len(syncs.states) == 2
    assert sum(name.startswith(".bb") for name in syncs.synced) == 2 and names(tmp_path)[-2:] == ["bb1", "bb2"]
    clock.now += 601
    folders.write(files(tmp_path, "cc1", "cc2"))
    assert len(syncs.states) == 4


def test_many_files_may_take_longer(tmp_path, syncs, clock):
    folders = SyncedFolders(tmp_path, clock)

    def slow(number):
        clock.now += 0.6

    syncs.at = slow
    folders.write(files(tmp_path, *(f"aa{number}" for number in range(200))))
    folders.write(files(tmp_path, "bb1", "bb2"))
    assert len(syncs.states) == 4


def test_both_ways_write_the_same_on_this_machine(tmp_path):
    """Without anything replaced: whichever way this file system gets, and the other one."""
    one, other = tmp_path / "one", tmp_path / "other"
    SyncedFolders(one).write(files(one, "aa1", "bb1", "bb2"))
    each = SyncedFolders(other)
    each._left_alone_until = float("inf")
    each.write(files(other, "aa1", "bb1", "bb2"))
    assert names(one) == names(other) == ["aa1", "bb1", "bb2"]
    assert all((one / path.relative_to(other)).read_bytes() == data for path, data in files(other, "aa1", "bb1", "bb2"))
    # The umask of whoever runs the service decides who may read, as with any other file.
    assert (one / "aa" / "aa1").stat().st_mode == (other / "aa" / "aa1").stat().st_mode


def test_a_memory_file_system_or_an_old_kernel_is_not_synced_as_a_whole(monkeypatch):
    if Path("/dev/shm").is_dir():
        assert not synced_files._syncs_as_a_whole(Path("/dev/shm"))
    device = os.stat("/").st_dev
    check = synced_files._device_syncs_as_a_whole.__wrapped__
    monkeypatch.setattr(synced_files.os, "uname", lambda: SimpleNamespace(sysname="Linux", release="5.4.0-150-generic"))
    assert not check(os.major(device), os.minor(device))
    monkeypatch.setattr(synced_files.os, "uname", lambda: SimpleNamespace(sysname="Darwin", release="24.1.0"))
    assert not check(os.major(device), os.minor(device))
    monkeypatch.setattr(synced_files.os, "uname", lambda: SimpleNamespace(sysname="Linux", release="unknown"))
    assert not check(os.major(device), os.minor(device))


@pytest.mark.parametrize(
    ("filesystem", "whole"), [(b"ext4", True), (b"xfs", True), (b"overlay", False), (b"nfs4", False)]
)
def test_the_file_system_is_that_of_the_mount(tmp_path, monkeypatch, filesystem, whole):
    """Mount points are any bytes, and optional fields come before the dash."""
    lines = [
        b"22 27 0:21 / /proc rw - proc proc rw",
        b"30 27 8:2 / /media/Disque\xe9\\040- rw shared:1 master:2 - btrfs /dev/b rw",
        b"31 27 8:1 / /srv rw,relatime shared:3 - " + filesystem + b" /dev/a rw",
    ]
    table = tmp_path / "mountinfo"
    table.write_bytes(b"\n".join(lines) + b"\n")
    monkeypatch.setattr(synced_files, "_MOUNTS", str(table))
    monkeypatch.setattr(synced_files.os, "uname", lambda: SimpleNamespace(sysname="Linux", release="6.6+"))
    assert synced_files._device_syncs_as_a_whole.__wrapped__(8, 1) is whole
    assert not synced_files._device_syncs_as_a_whole.__wrapped__(8, 7)


def test_what_interrupted_writes_left_is_found(tmp_path):
    left = synced_files._temporary(tmp_path / "aa1")
    left.write_bytes(b"half")
    synced_files._temporary(tmp_path / "aa10").write_bytes(b"half")
    assert temporary_files(tmp_path / "aa1") == [left]


def test_an_unfinished_folder_goes_and_so_do_those_of_killed_ones_but_not_those_of_others_at_work(tmp_path):
    parent = tmp_path / "sets"
    parent.mkdir()
    killed = (
        "import os, sys, pathlib; from store.synced_files import unfinished_folder\n"
        "with unfinished_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", killed, str(parent)], check=False)
    (left,) = parent.iterdir()
    assert (left / "half").exists()
    with unfinished_folder(parent) as first:
        assert not left.exists()
        with pytest.raises(RuntimeError), unfinished_folder(parent) as second:
            assert first != second and {first, second} == set(parent.iterdir())
            raise RuntimeError
        assert list(parent.iterdir()) == [first]
    assert not list(parent.iterdir())
