"""Who a process is among those of its job, and how runs are spread over them."""

import os
import re
import signal
import socket
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_fixtures import logs, ranks

from cache_spec import UserError
from train.preparing import spread
from train.ranks import alone, joined, local_device, read_parallel, read_rank
from train.watch import Rank

TORCHRUN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def rank(index: int, count: int, **changes) -> Rank:
    return Rank(
        **{"index": index, "count": count, "local_index": index, "local_count": count, **changes}, host="a", pid=7
    )


def test_a_process_that_nobody_started_as_one_of_several_is_alone():
    found = read_rank({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"})
    assert (found.index, found.count, found.host, found.pid) == (0, 1, socket.gethostname(), os.getpid())
    assert read_parallel("", found) == read_parallel("sweep", found) == ""
    with pytest.raises(UserError, match="--parallel layers"), joined(found, parallel="layers", device="cpu"):
        pass


def test_torchrun_says_which_rank_a_process_is():
    found = read_rank(
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **TORCHRUN},
    )
    assert (found.index, found.count, found.local_index, found.local_count) == (5, 8, 1, 4)
    assert read_parallel("", found) == "sweep"
    assert str(found) == f"rank 5 (host {found.host}, pid {os.getpid()})"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "1"}, "only RANK is set"),
        ({"WORLD_SIZE": "2"}, "only WORLD_SIZE is set"),
        ({"RANK": "two", "WORLD_SIZE": "4", **TORCHRUN}, "RANK is 'two'"),
        ({"RANK": "4", "WORLD_SIZE": "4", **TORCHRUN}, "RANK 4 of WORLD_SIZE 4"),
        ({"RANK": "1", "WORLD_SIZE": "4", **TORCHRUN, "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"RANK": "1", "WORLD_SIZE": "4", **TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT 70000 is above"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2", **TORCHRUN}, "on this machine 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "9", **TORCHRUN}, "on this machine 1 of 9"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **TORCHRUN}, "on this machine 1"),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", **TORCHRUN}, "on this machine 0"),
    ],
)
def test_variables_that_cannot_be_are_refused(environ, words):
    with pytest.raises(UserError, match=words):
        read_rank(environ)


def test_an_unknown_way_to_share_the_work_is_refused():
    with pytest.raises(UserError, match="--parallel layers is unknown; it is one of sweep, data, latents"):
        read_parallel("layers", rank(0, 2))


def nothing(team):
    raise AssertionError("the job began")


def test_what_no_rank_can_do_is_said_by_one(tmp_path):
    assert ranks(nothing, 2, "layers", tmp_path) == [2, 2]
    assert logs(tmp_path).count("--parallel layers is unknown") == 1


def refuse(team):
    """On both ranks; the second one is slow to look at what the first has said."""
    if team.rank.index:
        told = team.watch.told

        def slowly():
            time.sleep(0.5)
            return told()

        team.watch.told = slowly
    raise UserError("no room for any of us")


def test_an_error_of_all_is_said_once_though_one_is_slow(tmp_path):
    """The first rank, which keeps the store, waits until the other has looked."""
    assert ranks(refuse, 2, "sweep", tmp_path) == [2, 2]
    assert logs(tmp_path).strip() == "error: no room for any of us"


def refuse_one(team):
    """The second rank has an error of its own, and torchrun stops it while it asks whether the first has it too."""
    if team.rank.index:
        team.watch.told = lambda: signal.raise_signal(signal.SIGTERM)
        raise UserError("no room for me")
    team.gather("nothing")


def test_an_error_of_one_is_said_by_it_though_it_is_stopped_meanwhile(tmp_path):
    assert ranks(refuse_one, 2, "sweep", tmp_path) == [1, 2]
    assert re.fullmatch(r"error: rank 1 \(.*\) stopped: no room for me\n", (tmp_path / "rank_1.log").read_text())
    assert "no room for me" in (tmp_path / "rank_0.log").read_text()


@pytest.mark.parametrize(
    ("hosts", "environs"),
    [
        ("ab", [{}, {}]),  # one a machine, and nobody said so
        ("abab", [{"LOCAL_RANK": place, "LOCAL_WORLD_SIZE": "2"} for place in "0011"]),  # dealt out by turns
        ("aa", [{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}]),
    ],
)
def test_ranks_that_are_not_those_of_one_machine_share_no_memory(hosts, environs, tmp_path):
    environs = [environ | {"TEST_HOST": host} for host, environ in zip(hosts, environs, strict=True)]
    codes = ranks(nothing, len(hosts), "sweep", tmp_path, environs=environs)
    assert 0 not in codes
    assert logs(tmp_path).count("ranks of one machine; set LOCAL_RANK and LOCAL_WORLD_SIZE") == 1
    assert "AssertionError" not in logs(tmp_path)


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second = rank(5, 8, local_index=1, local_count=4)
    assert local_device("cuda", second) == "cuda:1"
    assert local_device("cuda:0", second) == "cuda:0"
    assert local_device("cpu", second) == "cpu"
    assert local_device("cuda", rank(0, 1)) == "cuda"
    with pytest.raises(UserError, match=r"4 processes on a and 2 GPUs.*--nproc-per-node=2"):
        local_device("cuda", rank(6, 8, local_index=2, local_count=4))


def test_a_team_of_one_gives_back_what_it_gathers_as_json_has_it():
    team = alone()
    assert team.gather({"n": (1, 2)}) == [{"n": [1, 2]}]
    assert team.agree("so") == "so"
    assert team.part_of(10) == 10
    assert team.is_first
    assert team.node == team.members
    with joined(read_rank({}), parallel="", device="cpu") as joined_alone:
        assert joined_alone.rank.count == 1
        assert joined_alone.watch is None


@given(costs=st.lists(st.floats(1, 100), max_size=30), n_ranks=st.integers(1, 8))
def test_every_run_is_on_one_rank_and_none_has_more_than_one_costliest_run_too_many(costs, n_ranks):
    shares = spread(costs, n_ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0) + 1e-6


def test_alike_runs_are_dealt_out_evenly():
    assert spread([1.0] * 7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
