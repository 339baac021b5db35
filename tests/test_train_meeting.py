"""Where the ranks of a job meet: only those of one attempt, whatever an attempt before it left in the store."""

import json
import socket
import threading
from collections.abc import Callable, Sequence

import pytest
import torch.distributed as dist
from parallel_fixtures import logs, ranks

from cache_spec import UserError
from train import meeting
from train.watch import Rank


def rank(index: int, count: int, pid: int) -> Rank:
    return Rank(index=index, count=count, local_index=index, local_count=count, host="a", pid=pid)


def meet(store, people: Sequence[Rank]) -> list:
    """What each of them finds, or the error that it gets; all look at once."""
    found: list = [None] * len(people)

    def come(i: int, who: Rank) -> None:
        try:
            found[i] = meeting._called(dist.PrefixStore("granary/", store), who)
        except UserError as error:
            found[i] = error

    threads = [threading.Thread(target=come, args=each) for each in enumerate(people)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_ranks_of_a_job_find_each_other_in_a_place_of_their_own():
    store, people = dist.HashStore(), tuple(rank(i, 4, 10 + i) for i in range(4))
    found = meet(store, people)
    assert [members for _, members in found] == [people] * 4
    found[0][0].set("said", "once")
    assert all(inner.get("said") == b"once" for inner, _ in found)
    later = tuple(rank(i, 3, 20 + i) for i in range(3))  # one machine fewer
    again = meet(store, later)
    assert [members for _, members in again] == [later] * 3
    assert not again[1][0].check(["said"])


@pytest.mark.parametrize("before", ["whole", "without one", "without the first"])
def test_a_rank_that_comes_early_waits_for_its_own_first_rank(before, monkeypatch):
    """It is there before the first rank has come again, and the store holds what the attempt before it left."""
    monkeypatch.setattr(meeting, "JOIN_SECONDS", 30)
    store = dist.HashStore()
    old = [rank(0, 2, 10), rank(1, 2, 11)]
    if before == "whole":
        meet(store, old)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(meeting, "JOIN_SECONDS", 0.05)
            assert isinstance(meet(store, [old[before == "without the first"]])[0], UserError)
    new, found = (rank(0, 2, 20), rank(1, 2, 21)), []
    early = threading.Thread(target=lambda: found.extend(meet(store, [new[1]])))
    early.start()
    early.join(0.1)
    assert early.is_alive()
    assert meet(store, [new[0]])[0][1] == new
    early.join()
    assert found[0][1] == new


def test_who_did_not_come_is_named(monkeypatch):
    monkeypatch.setattr(meeting, "JOIN_SECONDS", 0.2)
    first, third = meet(dist.HashStore(), [rank(0, 4, 10), rank(2, 4, 12)])
    assert "of 4 ranks 1, 3 did not come within 0.2 s" in str(first)
    assert "of 4 ranks 1, 3 did not come within 0.2 s" in str(third)
    (second,) = meet(dist.HashStore(), [rank(1, 2, 11)])
    assert "of 2 ranks 0 did not come" in str(second)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("address", ["no.such.host.invalid", "two..dots", "127.0.0.1"])
def test_a_place_where_nobody_can_meet_is_one_sentence(address, index, monkeypatch, capfd):
    """A name that means nothing, and a machine where nobody comes."""
    monkeypatch.setattr(meeting, "JOIN_SECONDS", 0.5)
    monkeypatch.setenv("MASTER_ADDR", address)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(found.getsockname()[1]))
    monkeypatch.setenv("RANK", str(index))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=f"no meeting place at {address}:") as refused:
        meeting.meet(rank(index, 2, 10))
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def say(team, what: str, folder) -> None:
    said = team.gather([what, team.rank.index])
    (folder / f"{what}_{team.rank.index}.json").write_text(json.dumps(said))


def fail(team) -> None:
    team.gather(["old", team.rank.index])
    raise UserError("this attempt is over")


def test_an_attempt_that_machines_count_differently_hears_nothing_of_the_one_before(tmp_path):
    """torchrun keeps one store for all attempts; it counts only those that failed on the same machine."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    kept = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}

    def attempt(function: Callable[..., None], counts: tuple[int, int], *arguments) -> list[int | None]:
        environs = [kept | {"TORCHELASTIC_RESTART_COUNT": str(count)} for count in counts]
        return ranks(function, 2, "sweep", tmp_path, *arguments, environs=environs)

    assert 0 not in attempt(fail, (0, 0))
    assert attempt(say, (0, 1), "new", tmp_path) == [0, 0], logs(tmp_path)
    for index in range(2):
        assert json.loads((tmp_path / f"new_{index}.json").read_text()) == [["new", 0], ["new", 1]]
