"""How a rank learns that another is gone: by its word, its process, its silence, or the loss of what joins them."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, cast

import pytest
import torch.distributed as dist

from train import watch as watching
from train.run_folder import GO_ON
from train.watch import INTERRUPTED, JobEnded, Rank, Watch, interrupted_once

HERE = os.getpid()


class GoneStore:
    """A store whose other end is gone."""

    def set(self, *_: object) -> None:
        raise RuntimeError("Broken pipe")

    check = get = append = multi_get = set


class MuteStore:
    """A store on a machine that was switched off."""

    def set(self, *_: object) -> None:
        threading.Event().wait(20)

    check = get = append = multi_get = set


def members(*hosts: str, pid: int = HERE) -> list[Rank]:
    n = len(hosts)
    return [
        Rank(index=i, count=n, local_index=i, local_count=n, host=host, pid=pid if i == n - 1 else HERE)
        for i, host in enumerate(hosts)
    ]


def watches(ranks: list[Rank], store: Any = None) -> list[Watch]:
    """One for each rank, none of them running."""
    store = dist.PrefixStore("watch", dist.HashStore()) if store is None else store
    return [Watch(store, rank, ranks, interrupted=threading.Event(), keeps=True) for rank in ranks]


@pytest.fixture(scope="module")
def dead() -> int:
    """The pid of a process that has been."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_ranks_that_live_or_ended_well_are_not_gone():
    first, second, third = watches(members("a", "a", "b"))
    assert not first.look()
    for other in (third, second):
        other.tell("")
        other.leave()
    assert not first.look()
    first.check()
    first.wait_for_others()


def test_in_the_end_nobody_asks_the_store_any_more():
    """A thread that is in torch's own code when Python ends aborts it."""
    store, asked = dist.HashStore(), threading.Event()

    class Slow:
        def set(self, key: str, value: str) -> None:
            asked.set()
            time.sleep(0.5)
            store.set(key, value)

        def check(self, keys: list[str]) -> bool:
            return store.check(keys)

    watch, _ = watches(members("a", "b"), Slow())
    with watch:
        assert asked.wait(5)
    assert not [thread for thread in threading.enumerate() if thread.name in ("look", "watch")]


def test_a_process_that_is_gone_from_this_machine_died(dead):
    first, second, _ = watches(members("a", "a", "a", pid=dead))
    assert first.look()
    assert (
        first.reason == f"rank 2 (host a, pid {dead}) died without a word: it was killed, by hand or for want of memory"
    )
    assert first.sentence == f"{first.reason}; {GO_ON}"
    with pytest.raises(JobEnded, match="died without a word"):
        first.check()
    assert first.speaks
    assert second.look()
    assert not second.speaks


def test_where_the_first_rank_died_the_next_of_each_host_speaks(dead):
    ranks = [Rank(index=i, count=4, host="ab"[i // 2], pid=dead if i == 0 else HERE) for i in range(4)]
    found = watches(ranks)
    assert found[1].look()
    assert found[1].speaks
    found[1].tell("ended with the others")
    assert found[2].look()
    assert found[3].look()
    assert found[2].reason == found[1].reason
    assert [found[2].speaks, found[3].speaks] == [True, False]


def test_a_zombie_counts_as_dead():
    process = subprocess.Popen([sys.executable, "-c", ""])
    first, _ = watches(members("a", "a", pid=process.pid))
    last = time.monotonic() + 30
    while not first.look() and time.monotonic() < last:
        time.sleep(0.01)
    assert first.reason is not None
    process.wait()


def test_a_rank_on_another_machine_is_gone_when_its_heart_stands_still(monkeypatch):
    monkeypatch.setattr(watching, "SILENT_SECONDS", 0.2)
    first, second = watches(members("a", "b"))
    for _ in range(5):
        assert not first.look()
        assert not second.look()
        time.sleep(0.1)
    assert not first.look()  # it sees the last beat
    time.sleep(0.3)
    assert first.look()
    assert "rank 1 (host b" in first.sentence
    assert "no sign of life" in first.sentence


def test_an_error_is_passed_on_in_its_own_words():
    first, second, third = watches(members("a", "b", "c"))
    second.tell("stopped: the disk is full")
    second.tell("nothing else counts")
    assert third.look()
    third.tell("ended with the others")
    assert first.look()
    assert first.reason == third.reason == f"rank 1 (host b, pid {HERE}) stopped: the disk is full"


def test_a_signal_that_came_to_all_is_no_reason():
    first, second = watches(members("a", "b"))
    second.tell(INTERRUPTED)
    first._interrupted.set()
    assert not first.look()
    first._interrupted.clear()
    assert first.look()
    assert f"was stopped by Ctrl-C or a signal; {GO_ON}" in first.sentence


def test_without_the_store_there_is_a_reason_too(dead, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "29400")
    [first, _] = watches(members("a", "b"), GoneStore())
    assert first.look()
    assert first.reason == "the store of the job at node0:29400 is gone, with rank 0 or torchrun"
    first.tell("")
    first.wait_for_others()
    [first, _] = watches(members("a", "a", pid=dead), GoneStore())
    assert first.look()
    assert f"rank 1 (host a, pid {dead}) died" in first.sentence


def test_the_main_thread_is_interrupted_once_and_later_signals_do_nothing(dead):
    ranks = members("a", "a", pid=dead)
    with interrupted_once() as interrupted:
        watch = Watch(dist.PrefixStore("watch", dist.HashStore()), ranks[0], ranks, interrupted=interrupted, keeps=True)
        with pytest.raises(KeyboardInterrupt), watch:
            time.sleep(30)
        assert interrupted.is_set()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is not None


def test_a_store_that_does_not_answer_is_gone_though_nothing_says_so(monkeypatch):
    monkeypatch.setattr(watching, "SILENT_SECONDS", 0.5)
    ranks = members("a", "b")
    with interrupted_once() as interrupted:
        watch = Watch(cast(Any, MuteStore()), ranks[1], ranks, interrupted=interrupted, keeps=True)
        with pytest.raises(KeyboardInterrupt), watch:
            time.sleep(15)
        watch.look()
        watch.tell("ended with the others")
    assert "does not answer: rank 0's machine is gone" in watch.sentence
    assert watch.speaks


def test_a_process_that_hangs_is_ended_with_the_sentence(dead):
    """As in a collective on a GPU, which no signal reaches."""
    code = f"""
import signal, threading, time
import torch.distributed as dist
from train import watch
watch.GRACE_SECONDS = 0.2
ranks = [watch.Rank(index=i, count=2, host="a", pid=pid) for i, pid in enumerate(({HERE}, {dead}))]
signal.signal(signal.SIGTERM, lambda *_: None)
with watch.Watch(dist.HashStore(), ranks[0], ranks, interrupted=threading.Event(), keeps=False):
    while True:
        time.sleep(1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == JobEnded.exit_code
    assert done.stderr.startswith(f"error: rank 1 (host a, pid {dead}) died without a word")
    assert done.stderr.endswith(f"; {GO_ON}\n")
