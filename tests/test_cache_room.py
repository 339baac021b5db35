"""The folder of copies: what makes room, what stays, what its options say."""

from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from cache_spec import UserError
from cache_spec.copies import Copies, copies_for, default_folder
from cache_spec.errors import DiskFull, RoomTooSmall
from cache_spec.room import Room


def test_what_a_dead_writer_left_makes_room(tmp_path):
    room = Room(tmp_path, 100)
    (tmp_path / ".0.dead.partial").write_bytes(bytes(90))
    (tmp_path / "old").write_bytes(bytes(10))
    with room.reserve(tmp_path / "new", 80) as partial:
        assert not (tmp_path / ".0.dead.partial").exists()
        assert (tmp_path / "old").exists()
        partial.write_at(40, bytes(40))
        partial.write_at(0, b"x" * 40)
        partial.replace()
    assert (tmp_path / "new").read_bytes() == b"x" * 40 + bytes(40)


def test_the_options_are_refused_for_a_folder_and_read_for_a_url(tmp_path, monkeypatch):
    assert copies_for("s3://b/k", tmp_path, "2G") == Copies(folder=tmp_path, n_bytes=2 * 2**30)
    assert copies_for(None, None, "").n_bytes == 50 * 2**30
    for option, given in (("--cache-dir", (tmp_path, "")), ("--cache-bytes", (None, "2G"))):
        with pytest.raises(UserError, match=f"{option} is for copies of a cache at a URL, and some/folder is a folder"):
            copies_for("some/folder", *given)
    with pytest.raises(UserError, match="--cache-bytes is 'lots'"):
        copies_for("s3://b/k", None, "lots")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/granary/caches")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert default_folder() == Path("~/.cache/granary/caches")


def test_a_disk_that_is_full_is_said_so_and_not_blamed_on_the_option(tmp_path, monkeypatch):
    room = Room(tmp_path, 10**9, patience=0.0)
    usage = type("Usage", (), {"free": 50})
    monkeypatch.setattr("cache_spec.room.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFull, match="needs 80 bytes, and 0 are held by what is open; make room or name another"):
        room.reserve(tmp_path / "new", 80)
    (tmp_path / "old").write_bytes(bytes(40))
    with room.reserve(tmp_path / "new", 80):  # the old one went
        assert not (tmp_path / "old").exists()
    assert list(tmp_path.rglob("*.partial")) == []


def test_one_that_is_being_written_counts_and_is_not_removed(tmp_path):
    room = Room(tmp_path, 100, patience=0.0)
    with room.reserve(tmp_path / "one", 60) as partial:
        with pytest.raises(RoomTooSmall, match=r"60 bytes in .* are held by what is open, and 50 more are needed"):
            room.reserve(tmp_path / "two", 50)
        partial.write_at(0, bytes(60))
        partial.replace()
    with room.reserve(tmp_path / "two", 50) as partial:
        partial.replace()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["two"]


def test_whoever_waits_for_room_is_woken_when_training_stops(tmp_path):
    room = Room(tmp_path, 100)
    room.stopping.set()
    with room.reserve(tmp_path / "one", 60), pytest.raises(CancelledError):
        room.reserve(tmp_path / "two", 60)


def test_a_copy_is_removed_even_from_under_those_who_read_it(tmp_path):
    room = Room(tmp_path, 100)
    (tmp_path / "one").write_bytes(b"kept")
    opened = room.open(tmp_path / "one")
    assert opened is not None
    with opened:
        room.remove(tmp_path / "one")
        room.remove(tmp_path / "one")
        assert opened.read() == b"kept"
    assert room.open(tmp_path / "one") is None
