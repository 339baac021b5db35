"""The folder of copies: what makes room, what stays, what its options say."""

import os
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from cache_spec import UserError
from cache_spec.copies import Copies, copies_for, default_folder
from cache_spec.errors import DiskFull, RoomTooSmall
from cache_spec.layout import INTERNAL
from cache_spec.room import Room

NAME = "cache.zarr-0123456789abcdef"
DEAD = f".0.{'d' * 32}.partial"


def test_what_a_dead_writer_left_makes_room(tmp_path):
    room = Room(tmp_path, 100)
    home = room.home(NAME)
    (home / DEAD).write_bytes(bytes(90))
    (home / "1").write_bytes(bytes(10))
    with room.reserve(home / "2", 80) as partial:
        assert not (home / DEAD).exists()
        assert (home / "1").exists()
        partial.write_at(40, bytes(40))
        partial.write_at(0, b"x" * 40)
        partial.replace()
    assert (home / "2").read_bytes() == b"x" * 40 + bytes(40)


@pytest.mark.parametrize(
    "file",
    [
        "thesis/data.bin",
        "runs/topk/log.jsonl",
        "0",
        "cache.zarr/layer_1/clean/c/0/0",
        "another-0123456789abcdef/layer_1/clean/c/0/0",  # named as ours, but not made by us
        f"{NAME}/notes.txt",
        f"{NAME}/layer_1/.0.partial",
        f"{NAME}/{INTERNAL}/windows.npy",
        f"{NAME}/{INTERNAL}/7",
    ],
)
def test_what_is_no_copy_stays_and_does_not_count(tmp_path, file):
    """--cache-dir may be any folder, the one with everything in it among them."""
    room = Room(tmp_path, 100, patience=0.0)
    path, copy = tmp_path / file, room.home(NAME) / "layer_1" / "1"
    for place in (path, copy):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes(100))
        os.utime(place, (0, 0))
    with room.reserve(room.home(NAME) / "2", 100):
        assert path.read_bytes() == bytes(100)
        assert not copy.exists()


def test_copies_that_a_user_keeps_under_another_name_stay(tmp_path):
    room = Room(tmp_path, 100, patience=0.0)
    (room.home(NAME) / "1").write_bytes(bytes(100))
    room.home(NAME).rename(tmp_path / "kept")
    with room.reserve(room.home(NAME) / "2", 100):
        assert (tmp_path / "kept" / "1").read_bytes() == bytes(100)


def test_links_and_pipes_stay_and_are_not_waited_for(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    room = Room(folder, 100, patience=0.0)
    home, marked = room.home(NAME), Room(elsewhere, 100).home(NAME)
    (elsewhere / "1").write_bytes(bytes(100))
    (marked / "1").write_bytes(bytes(100))
    (home / "1").symlink_to(elsewhere / "1")
    (home / "layer_1").symlink_to(marked)
    (folder / "other-0123456789abcdef").symlink_to(marked)
    os.mkfifo(home / "3")
    os.mkfifo(folder / "pipe")
    with room.reserve(home / "2", 100):
        assert (home / "1").is_symlink()
        assert (home / "3").is_fifo()
        assert (folder / "pipe").is_fifo()
    assert (elsewhere / "1").exists()
    assert (marked / "1").exists()


def test_the_options_are_refused_for_a_folder_and_read_for_a_url(tmp_path, monkeypatch):
    assert copies_for("s3://b/k", str(tmp_path), "2G") == Copies(folder=tmp_path, n_bytes=2 * 2**30)
    assert copies_for(None, None, "").n_bytes == 50 * 2**30
    for option, given in (("--cache-dir", (str(tmp_path), "")), ("--cache-bytes", (None, "2G"))):
        with pytest.raises(UserError, match=f"{option} is for copies of a cache at a URL, and some/folder is a folder"):
            copies_for("some/folder", *given)
    with pytest.raises(UserError, match="--cache-bytes is 'lots'"):
        copies_for("s3://b/k", None, "lots")
    for folder in ("", "s3://b/copies"):
        with pytest.raises(UserError, match=f"--cache-dir is '{folder}'; give a folder on this machine"):
            copies_for("s3://b/k", folder, "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/granary/caches")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert default_folder() == Path("~/.cache/granary/caches")


def test_a_disk_that_is_full_is_said_so_and_not_blamed_on_the_option(tmp_path, monkeypatch):
    room = Room(tmp_path, 10**9, patience=0.0)
    home = room.home(NAME)
    usage = type("Usage", (), {"free": 50})
    monkeypatch.setattr("cache_spec.room.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFull, match="needs 80 bytes, 50 are free and 0 held by what is open; make room or name"):
        room.reserve(home / "2", 80)
    (home / "1").write_bytes(bytes(40))
    with room.reserve(home / "2", 80):  # the old one went
        assert not (home / "1").exists()
    assert list(tmp_path.rglob("*.partial")) == []


def test_one_that_is_being_written_counts_and_is_not_removed(tmp_path):
    room = Room(tmp_path, 100, patience=0.0)
    home = room.home(NAME)
    with room.reserve(home / "1", 60) as partial:
        with pytest.raises(RoomTooSmall, match=r"60 bytes in .* are held by what is open, and 50 more are needed"):
            room.reserve(home / "2", 50)
        partial.write_at(0, bytes(60))
        partial.replace()
    with room.reserve(home / "2", 50) as partial:
        partial.replace()
    assert sorted(path.name for path in home.iterdir() if path.is_file()) == ["2"]


def test_whoever_waits_for_room_is_woken_when_training_stops(tmp_path):
    room = Room(tmp_path, 100)
    home = room.home(NAME)
    room.stopping.set()
    with room.reserve(home / "1", 60), pytest.raises(CancelledError):
        room.reserve(home / "2", 60)


def test_a_copy_is_removed_even_from_under_those_who_read_it(tmp_path):
    room = Room(tmp_path, 100)
    home = room.home(NAME)
    (home / "1").write_bytes(b"kept")
    opened = room.open(home / "1")
    assert opened is not None
    with opened:
        room.remove(home / "1")
        room.remove(home / "1")
        assert opened.read() == b"kept"
    assert room.open(home / "1") is None
