"""Claims: one owner a shard; a dead or silent owner loses it to one other; and no foreign clock is believed."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_spec import UserError
from harvest import claim_board, claims
from harvest.claim_board import FolderBoard, Note
from harvest.claims import Claims, check_timeout
from harvest.share import Share

ROOT = Path(__file__).parent.parent


class Clock:
    """A watcher's own time."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(tmp_path, clock):
    """Makes processes of machines of their own: what they know of each other is what the folder shows."""

    def made(machine="here", timeout=80.0):
        return Claims(FolderBoard(tmp_path / "claims"), Share(), timeout, machine=machine, clock=clock)

    return made


def test_a_shard_has_one_owner_until_it_is_given_back(make):
    first, second = make(), make()
    assert first.take(3)
    assert not second.take(3)
    second.look(read=True)
    assert list(second.others()) == [3]
    first.look(read=True)
    assert not first.others()
    assert not second.is_dead(second.others()[3])
    first.give_back(3)
    second.look(read=True)
    assert second.take(3)
    assert second.held() == [3]


def test_of_many_that_take_at_once_each_shard_goes_to_one(tmp_path):
    everyone = [Claims(FolderBoard(tmp_path / "claims"), Share()) for _ in range(8)]
    start, taken = threading.Barrier(8), [[] for _ in everyone]

    def take(number):
        start.wait()
        for shard in range(20):
            if everyone[number].take(shard):
                taken[number].append(shard)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(shard for shards in taken for shard in shards) == list(range(20))


def test_an_owner_elsewhere_is_dead_when_it_is_silent_for_long_on_the_watchers_clock(make, clock):
    owner, watcher = make("there"), make("here")
    owner.take(0)
    for _ in range(5):  # it lives: something changes between any two looks
        watcher.look(read=True)
        assert not watcher.is_dead(watcher.others()[0])
        owner._board.beat("000000.0")
        clock.now += 79
    watcher.look(read=True)
    assert watcher.others()[0].has_changed
    clock.now += 79
    watcher.look(read=True)
    assert not watcher.is_dead(watcher.others()[0])
    clock.now += 1
    assert watcher.is_dead(watcher.others()[0])


def test_times_of_files_and_clocks_of_others_mean_nothing(make, tmp_path, clock, monkeypatch):
    owner, watcher = make("there"), make("here")
    owner.take(0)
    watcher.look(read=True)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    for when in (0, 2**31, 1):
        os.utime(tmp_path / "claims" / "000000.0", (when, when))
        clock.now += 20
        watcher.look(read=True)
        assert not watcher.is_dead(watcher.others()[0])
        assert not watcher.others()[0].has_changed
    clock.now += 40
    assert watcher.is_dead(watcher.others()[0])


def test_a_dead_owners_shard_goes_to_one_of_those_who_see_it(make, clock):
    owner, *watchers = make("there"), make("a"), make("b"), make("c")
    owner.take(5)
    for watcher in watchers:
        watcher.look(read=True)
    clock.now += 100
    assert [watcher.take(5) for watcher in watchers] == [True, False, False]
    watchers[1].look(read=True)
    (claim,) = watchers[1].others().values()
    assert claim.number == 1
    assert not watchers[1].is_dead(claim)
    clock.now += 100  # and that one dies too
    assert watchers[1].take(5)


def test_an_owner_that_beats_more_slowly_is_given_its_own_time(make, clock):
    owner, watcher = make("there", timeout=800.0), make("here", timeout=8.0)
    owner.take(0)
    watcher.look(read=True)
    clock.now += 300
    assert not watcher.is_dead(watcher.others()[0])
    clock.now += 100
    assert watcher.is_dead(watcher.others()[0])


OWNER = """
import sys, time
from pathlib import Path
from harvest.claim_board import FolderBoard
from harvest.claims import Claims
from harvest.share import Share
with Claims(FolderBoard(Path(sys.argv[1])), Share(index=1, count=3, source="--shard")) as mine:
    print(mine.take(7), flush=True)
    time.sleep(60)
"""


def test_the_claim_of_a_process_killed_on_this_machine_is_free_at_once(tmp_path):
    watcher = Claims(FolderBoard(tmp_path), Share())
    words = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "True\n"
        watcher.look(read=True)
        claim = watcher.others()[7]
        assert str(owner.pid) in claim.owner
        assert claim.share == Share(index=1, count=3)
        assert not watcher.is_dead(claim)
        owner.kill()
    assert watcher.is_dead(claim)
    assert watcher.take(7)


def test_a_living_process_keeps_its_claims_changing_and_takes_them_back_at_the_end(tmp_path):
    board = FolderBoard(tmp_path / "claims")
    watcher = Claims(FolderBoard(tmp_path / "claims"), Share(), timeout=0.1)
    with Claims(board, Share(), timeout=0.1) as mine:
        mine.take(0)
        mine.take(1)
        until = time.monotonic() + 20
        while not all(claim.has_changed for claim in watcher.others().values()) or not watcher.others():
            assert time.monotonic() < until
            watcher.look(read=True)
        mine.give_back(1)
        watcher.look(read=True)
        assert list(watcher.others()) == [0]
    assert not (tmp_path / "claims").exists()


def test_a_claim_that_cannot_be_kept_is_said_once_and_kept_again_later(tmp_path, monkeypatch, capsys):
    board, beats = FolderBoard(tmp_path), []

    def beat(name):
        beats.append(name)
        if len(beats) < 4:
            raise OSError(28, "No space left on device", name)

    monkeypatch.setattr(board, "beat", beat)
    with Claims(board, Share(), timeout=0.05) as mine:
        mine.take(2)
        until = time.monotonic() + 20
        while len(beats) < 6:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert capsys.readouterr().out.count("the claim on shard 2 cannot be kept ([Errno 28]") == 1


@given(head=st.binary(max_size=40) | st.sampled_from([b"[]\n", b'{"share": [3, 2], "every": "x"}\n', b"[" * 1000]))
def test_a_claim_of_any_content_is_a_claim(head):
    claim = claims._seen("000004.2", Note(head=head, n_bytes=len(head)), None, 0.0)
    assert (claim.shard, claim.number, claim.share, claim.every) == (4, 2, None, 0.0)
    assert claim.owner


def test_what_else_lies_in_the_folder_is_left_alone(tmp_path, make):
    folder = tmp_path / "claims"
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    (folder / "000001.0").symlink_to("/etc/passwd")
    (folder / "000002.0").mkdir()
    board, mine = FolderBoard(folder), make()
    assert not board.names()
    assert not mine.take(1)
    assert mine.take(0)
    board.clear()
    assert sorted(path.name for path in folder.iterdir()) == ["000001.0", "000002.0", "notes.txt"]


def test_a_claim_that_vanishes_between_two_steps_is_no_claim(tmp_path, monkeypatch):
    board = FolderBoard(tmp_path)
    monkeypatch.setattr(board, "names", lambda: ["000000.0"])
    assert board.read("000000.0") is None
    assert not board.is_abandoned("000000.0")
    board.clear()
    assert not tmp_path.exists()


def test_a_machine_without_a_boot_id_has_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(claim_board, "_BOOT", tmp_path / "none")
    assert claim_board.this_machine() == os.uname().nodename


@pytest.mark.parametrize("seconds", [0.0, 0.5, -1.0, float("nan"), float("inf"), 1e6])
def test_a_timeout_that_makes_no_sense_is_one_sentence(seconds):
    with pytest.raises(UserError, match=r"--claim-timeout is .*; give 1 to 86400 seconds, such as 120"):
        check_timeout(seconds)


def test_claims_are_read_when_they_are_new_and_then_as_often_as_they_change(make, clock, monkeypatch):
    owner, watcher, read = make("there"), make("here"), []
    real = watcher._board.read
    monkeypatch.setattr(watcher._board, "read", lambda name: read.append(name) or real(name))
    owner.take(0)
    watcher.look(read=False)
    assert not read
    assert list(watcher.others()) == [0]
    clock.now += 1000
    assert not watcher.is_dead(watcher.others()[0])  # nothing is known of it yet
    for seconds, wanted in ((0, 1), (1, 1), (1, 1), (10, 2)):
        clock.now += seconds
        watcher.look(read=True)
        assert len(read) == wanted
    owner.take(1)
    watcher.look(read=True)
    assert read == ["000000.0", "000000.0", "000001.0"]
