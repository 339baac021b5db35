"""Turns: a process makes its own shards, then what others leave undone, and waits for no one who is gone."""

import threading
import time
from functools import partial

import pytest
from cache_fixtures import make_plan

from cache_spec.layout import RECORDS, record_file
from harvest.claim_board import FolderBoard
from harvest.claims import Claims
from harvest.share import CLAIM, Share, read_share
from harvest.turns import Turns

PLAN = make_plan(n_rows=64 * 7, n_train_rows=64 * 7)  # seven shards


def is_there(out, shard):
    return (out / record_file(shard)).exists()


@pytest.fixture
def out(tmp_path):
    (tmp_path / RECORDS).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def join(out):
    """Starts a process, each on a machine of its own, so that it is judged by its beats."""
    started = []

    def joined(share=Share(), timeout=2.0):
        claims = Claims(FolderBoard(out / "claims"), share, timeout, machine=str(len(started)))
        claims.__enter__()
        started.append(claims)
        there = [shard for shard in range(7) if is_there(out, shard)]
        return Turns(PLAN, share, claims, there, partial(is_there, out)), claims

    yield joined
    for claims in started:
        claims.__exit__(None, None, None)


def rank(index, count):
    return read_share("", {"RANK": str(index), "WORLD_SIZE": str(count)})


def by_hand(index, count):
    return read_share(f"{index}/{count}", {})


def commit(out, claims, shard):
    (out / record_file(shard)).write_text("{}")
    claims.give_back(shard)


def make_all(out, turns, claims):
    made = []
    while (shard := turns.next()) is not None:
        commit(out, claims, shard)
        made.append(shard)
    return made


def vanish(claims):
    """As if its machine had lost its power: nothing is taken back, and nothing changes any more."""
    claims._stopped.set()
    claims._thread.join()


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (Share(), [0, 1, 2, 3, 4, 5, 6]),
        (read_share(CLAIM, {"RANK": "1", "WORLD_SIZE": "3"}), [0, 1, 2, 3, 4, 5, 6]),
        (rank(1, 3), [1, 4, 6, 5, 3, 2, 0]),
        (by_hand(1, 3), [1, 4]),
        (by_hand(7, 8), []),
    ],
)
def test_a_process_begins_with_its_own_and_goes_on_with_what_nobody_makes(out, join, share, wanted):
    turns, claims = join(share)
    assert make_all(out, turns, claims) == wanted
    assert not turns.wait(pytest.fail)
    assert turns.left() == []


def test_two_processes_never_have_the_same_shard(out, join):
    (one, its), (other, others) = join(), join(rank(0, 2))
    made = [one.next(), other.next(), one.next(), other.next(), other.next()]
    assert made == [0, 2, 1, 4, 6]
    for claims in (its, others):
        for shard in claims.held():
            commit(out, claims, shard)
    assert sorted(made + make_all(out, one, its)) == list(range(7))


def test_who_is_done_waits_for_those_who_live(out, join):
    (one, its), (other, others) = join(), join()
    assert other.next() == 0
    assert make_all(out, one, its) == [1, 2, 3, 4, 5, 6]
    said, ended = [], []
    waiting = threading.Thread(target=lambda: ended.append(one.wait(said.append, poll=0.01)))
    waiting.start()
    time.sleep(2.5)  # longer than the timeout
    assert not ended
    assert "waiting for shard 0 (" in said[0]
    assert len(said) == 1
    commit(out, others, 0)
    waiting.join(20)
    assert ended == [False]


@pytest.mark.parametrize("share", [Share(), rank(1, 2)])
def test_the_shard_of_a_machine_that_vanished_is_made_by_who_waits(out, join, share):
    (one, its), (other, others) = join(share), join()
    assert other.next() == 0
    make_all(out, one, its)
    vanish(others)
    assert one.wait(lambda said: None, poll=0.01)
    assert make_all(out, one, its) == [0]
    assert not one.wait(pytest.fail)


def test_a_share_cut_by_hand_takes_over_the_share_of_one_that_died_and_of_no_other(out, join):
    (one, its), (_, other), (late, lates) = join(by_hand(0, 4)), join(by_hand(1, 4)), join(by_hand(2, 4))
    assert other.take(1)
    assert lates.take(2)
    assert make_all(out, one, its) == [0, 4]
    vanish(other)
    assert one.wait(lambda said: None, poll=0.01)
    assert make_all(out, one, its) == [5, 1]
    begin = time.monotonic()
    assert not one.wait(lambda said: None, poll=0.01)
    assert time.monotonic() - begin < 10  # 2 lives and 3 has not come: neither is waited for
    assert one.left() == []
    assert late.left() == [2, 6]


def test_a_shard_committed_between_the_look_and_the_claim_is_not_made(out, join, monkeypatch):
    turns, claims = join()
    real = claims.take

    def take(shard):
        if shard == 0:  # its maker is done and has taken its claim back
            (out / record_file(0)).write_text("{}")
        return real(shard)

    monkeypatch.setattr(claims, "take", take)
    assert turns.next() == 1
    assert claims.held() == [1]


def test_rows_ahead_are_those_made_in_hand_and_free(out, join):
    (one, its), (other, _) = join(), join()
    assert one.n_rows_ahead() == 64 * 7
    assert (one.next(), other.next()) == (0, 1)
    commit(out, its, 0)
    assert one.next() == 2
    assert one.n_rows_ahead() == 64 * 6
    ranks, _ = join(rank(1, 3))
    assert ranks.n_rows_ahead() == 64 * 2
