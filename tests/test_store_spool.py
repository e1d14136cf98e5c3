"""What is spooled comes back once the store answers, in order, whole, and a bad batch holds up no other."""

from __future__ import annotations

import pytest

from store.spool import Spool


class Sink:
    """Collects what a replay writes; refuses rows marked bad, and everything while `down`."""

    def __init__(self):
        self.rows: list[dict] = []
        self.images: dict[str, bytes] = {}
        self.down = False

    def __call__(self, rows, images):
        if self.down:
            raise ConnectionError("store is down")
        if any(row.get("bad") for row in rows):
            raise ValueError("bad row")
        self.rows += rows
        self.images |= images


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool")


def test_batches_come_back_in_order_with_their_bytes(spool):
    rows = [
        {"id": "a", "embedding": bytes(range(256)), "metadata": {"site": "Rücken\n"}},
        {"id": "b", "embedding": None},
    ]
    spool.append(rows, {"h": b"\x00\xff"})
    spool.append([{"id": "c"}], {})
    assert spool.pending() == 2
    sink = Sink()
    assert spool.replay(sink) == 3
    assert sink.rows == [*rows, {"id": "c"}] and sink.images == {"h": b"\x00\xff"}
    assert spool.pending() == 0 and spool.replay(sink) == 0
    assert list(spool.directory.iterdir()) == []


def test_nothing_is_lost_while_the_store_is_down(spool):
    spool.append([{"id": "a"}], {})
    sink = Sink()
    sink.down = True
    with pytest.raises(ConnectionError):
        spool.replay(sink)
    assert spool.pending() == 1
    sink.down = False
    assert spool.replay(sink) == 1


def test_a_torn_batch_gives_its_whole_lines_and_is_kept(spool):
    path = spool.append([{"id": "a"}, {"id": "b"}], {})
    path.write_bytes(path.read_bytes()[:-9])
    spool.append([{"id": "c"}], {})
    sink = Sink()
    assert spool.replay(sink) == 2
    assert [row["id"] for row in sink.rows] == ["a", "c"]
    assert [file.suffix for file in spool.directory.iterdir()] == [".damaged"]


def test_a_refused_row_neither_blocks_nor_takes_its_neighbours(spool):
    spool.append([{"id": "a"}, {"id": "x", "bad": True}, {"id": "b"}], {})
    spool.append([{"id": "c"}], {})
    sink = Sink()
    assert spool.replay(sink) == 3
    assert [row["id"] for row in sink.rows] == ["a", "b", "c"]
    assert [file.suffix for file in spool.directory.iterdir()] == [".damaged"]


def test_a_crash_before_the_rename_leaves_nothing_to_replay(spool, monkeypatch):
    monkeypatch.setattr("store.image_files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        spool.append([{"id": "a"}], {})
    assert spool.pending() == 0 and list(spool.directory.iterdir()) == []


def test_an_unreadable_value_is_refused_at_append(spool):
    with pytest.raises(ValueError):
        spool.append([{"id": "a", "risk": float("nan")}], {})
    assert spool.pending() == 0


def test_batches_that_were_set_aside_are_counted(spool):
    assert spool.damaged() == 0
    spool.append([{"id": "a", "bad": True}], {})
    spool.append([{"id": "b"}], {})
    spool.replay(Sink())
    assert (spool.pending(), spool.damaged()) == (0, 1)
