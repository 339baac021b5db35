"""Batches that one rank reads for all of its machine: the same rows, no file touched by the others, no deadlock."""

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist
from train_fixtures import DATA, make_training_cache

from cache_spec import CacheDamaged, DiskFull, UserError
from train import sharing
from train.loader import MixedBatchLoader
from train.mixing import CLEAN, Mixture, Rows
from train.ranks import Team
from train.sharing import Sharing
from train.watch import JobEnded, Rank

LAST = 24
HALF, TWINS = Mixture(0.5), Mixture(0.25, with_twin=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_training_cache(tmp_path_factory.mktemp("sharing") / "cache")


@pytest.fixture(scope="module")
def plain(cache):
    return MixedBatchLoader(cache, DATA)


def teams(n: int) -> list[Team]:
    """The ranks of a machine, as threads of this process."""
    store = dist.HashStore()
    members = tuple(
        Rank(index=i, count=n, local_index=i, local_count=n, host="here", pid=os.getpid()) for i in range(n)
    )
    return [
        Team(rank=rank, members=members, parallel="sweep", store=dist.PrefixStore("team", store)) for rank in members
    ]


def together(n: int, act: Callable[[Team], Any]) -> list[Any]:
    """What each rank does at the same time as the others."""
    with ThreadPoolExecutor(n) as pool:
        return [future.result(timeout=60) for future in [pool.submit(act, team) for team in teams(n)]]


def same(got: Rows, wanted: Rows, mixture: Mixture) -> bool:
    fraction, schedule, with_twin = mixture
    ours, theirs = (rows.mix(fraction, schedule=schedule, with_twin=with_twin) for rows in (got, wanted))
    if with_twin:
        assert ours.twin is not None
        assert theirs.twin is not None
        assert ours.twin.equal(theirs.twin)
    return ours.x.equal(theirs.x)


def test_ranks_that_start_apart_and_mix_otherwise_get_the_rows_of_a_plain_read(cache, plain):
    """One wants nothing at all, one stops early, and of all of them only the first ever reads."""
    wanted = {0: (6, LAST, HALF), 1: (0, LAST, TWINS), 2: (LAST, LAST, None), 3: (3, LAST, HALF)}

    def act(team: Team) -> int:
        loader = MixedBatchLoader(cache, DATA, team=team)
        assert (loader.scale, loader.target_scale) == (plain.scale, plain.target_scale)
        if team.rank.index:
            vars(loader)["_reader"] = None
        first, last, mixture = wanted[team.rank.index]
        n_same = 0
        with loader.stream(first, last, {mixture} if mixture else set()) as stream:
            for step, rows in enumerate(stream, first):
                assert rows.step == step
                n_same += same(rows, plain.read(step), mixture or HALF)
                if team.rank.index == 3 and n_same == 4:
                    break
        return n_same

    assert together(4, act) == [LAST - 6, LAST, 0, 4]


def test_the_rank_that_reads_goes_on_for_the_others_when_it_wants_no_more_itself(cache):
    def first_leaves(team: Team) -> int:
        loader = MixedBatchLoader(cache, DATA, team=team)
        n = 0
        with loader.stream(0, LAST, CLEAN) as stream:
            for _ in stream:
                n += 1
                if team.rank.index == 0 and n == 2:
                    break
        return n

    assert together(2, first_leaves) == [2, LAST]


def test_damage_reaches_every_rank_with_its_words(cache, monkeypatch):
    words = "c/3/0 fails its checksum (bits: é)"

    def act(team: Team) -> str:
        loader = MixedBatchLoader(cache, DATA, team=team)

        class Damaged:
            def read(self, *_: object) -> None:
                raise CacheDamaged(words)

        if team.rank.index == 0:
            vars(loader)["_reader"] = Damaged()
        with pytest.raises(CacheDamaged) as caught, loader.stream(0, LAST, CLEAN) as stream:
            next(stream)
        return str(caught.value)

    assert together(3, act) == [words] * 3


def test_a_rank_that_reads_no_more_ends_the_others(cache):
    def act(team: Team) -> str:
        loader = MixedBatchLoader(cache, DATA, team=team)
        try:
            with loader.stream(0, LAST, CLEAN) as stream:
                for _ in stream:
                    if team.rank.index == 0:
                        raise KeyboardInterrupt
        except (KeyboardInterrupt, JobEnded) as end:
            return str(end)
        return "nothing ended it"

    assert "rank 0 (host here" in together(2, act)[1]


def test_a_machine_without_memory_for_it_says_how_much_it_takes(monkeypatch):
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)

    def act(team: Team) -> None:
        if team.rank.index == 0:
            with pytest.raises(DiskFull, match=r"no room for the \d[\d,]+ bytes.*lower --read-ahead or --batch-size"):
                sharing._new_memory(1 << 20)

    together(1, act)


def test_memory_that_cannot_be_opened_is_named():
    with pytest.raises(UserError, match="/proc/0/fd/7, the memory that another rank on this machine shares"):
        sharing._open_memory("/proc/0/fd/7")


def test_memory_needs_no_folder_for_shared_memory_and_leaves_no_file(cache):
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()

    def act(team: Team) -> bool:
        loader = MixedBatchLoader(cache, DATA, team=team)
        with loader.stream(0, LAST, CLEAN) as stream:
            next(stream)
            return not os.path.isdir("/dev/shm") or set(os.listdir("/dev/shm")) <= before

    assert all(together(2, act))


def test_a_ring_keeps_what_somebody_has_not_used_yet():
    """The rank that fills stays at most a ring ahead of the slowest."""
    n_slots, filled, lead = 3, [], []

    def act(team: Team) -> None:
        with Sharing(team).ring(0, LAST, CLEAN, n_slots=n_slots, slot_bytes=lambda _: 64) as ring:
            for step in range(LAST):
                if ring.reads:
                    with ring.filling(step):
                        ring.tensors(step, [(4, 8)])[0].fill_(step)
                    filled.append(step)
                else:
                    if team.rank.index == 1:
                        threading.Event().wait(0.002)
                    with ring.using(step):
                        lead.append(len(filled) - step)
                        assert ring.tensors(step, [(4, 8)])[0].eq(step).all()

    together(3, act)
    assert max(lead) <= n_slots + 1
    assert filled == list(range(LAST))
