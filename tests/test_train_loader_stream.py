"""Reading ahead: the rows of `read`, whatever the number of threads; errors with their sentence; no thread left."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_fixtures import make_loader_cache
from train_fixtures import DATA

from cache_spec import ActivationCache, CacheDamaged
from cache_spec.layout import activation_file
from train import loader as loader_module
from train.loader import MixedBatchLoader
from train.mixing import BOTH, CLEAN, Rows
from train.read_ahead import read_ahead
from train.staging import Memory


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_loader_cache(tmp_path_factory.mktemp("stream") / "cache")


def same(one: Rows, other: Rows) -> bool:
    pairs = [(getattr(one, each.name), getattr(other, each.name)) for each in fields(Rows)]
    return all(
        a.equal(b) if isinstance(a, torch.Tensor) else (a == b).all() if isinstance(a, np.ndarray) else a == b
        for a, b in pairs
    )


def n_readers() -> int:
    return sum(thread.name.startswith("read-ahead") for thread in threading.enumerate())


@settings(max_examples=25, deadline=None)
@given(
    io=st.sampled_from(["mmap", "pread"]),
    readers=st.integers(1, 5),
    ahead=st.integers(1, 6),
    first=st.integers(0, 30),
    n=st.integers(0, 12),
    with_masked=st.booleans(),
    target_hook=st.sampled_from(["", "layer_3"]),
)
def test_a_stream_is_what_read_gives_whatever_the_threads(
    cache, io, readers, ahead, first, n, with_masked, target_hook
):
    data = replace(DATA, io=io, readers=readers, read_ahead=ahead, target_hook=target_hook)
    plain = MixedBatchLoader(cache, replace(data, io="mmap"))
    with MixedBatchLoader(cache, data).stream(first, first + n, BOTH if with_masked else CLEAN) as stream:
        kept = list(stream)  # buffers are reused, rows must not be
    assert [rows.step for rows in kept] == list(range(first, first + n))
    assert all(same(rows, plain.read(rows.step, with_masked=with_masked)) for rows in kept)


def test_closing_early_leaves_no_thread(cache):
    loader = MixedBatchLoader(cache, DATA)
    with loader.stream(0, 60) as stream:
        assert next(stream).step == 0
        assert n_readers() >= 1
    assert n_readers() == 0
    with pytest.raises(ZeroDivisionError), loader.stream(0, 60):
        raise ZeroDivisionError
    assert n_readers() == 0


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_damage_reaches_the_caller_as_one_sentence_where_its_rows_are_due(tmp_path, io):
    """A file that is damaged after the start, as the first thread comes to it."""
    cache = make_loader_cache(tmp_path / "cache")
    loader = MixedBatchLoader(cache, replace(DATA, io=io, readers=3))
    fill, due = loader.fill, 6

    def fail(stage, step, mixtures):
        if step == due:
            raise CacheDamaged(f"{activation_file('layer_1', 'clean', 2)} fails its checksum")
        return fill(stage, step, mixtures)

    loader.fill = fail
    seen = []
    with pytest.raises(CacheDamaged, match=r"layer_1/clean/c/2/0 fails its checksum"), loader.stream(0, 60) as stream:
        seen.extend(rows.step for rows in stream)
    assert seen == [] or seen == list(range(due))  # extend keeps nothing of what it could not finish
    assert n_readers() == 0


def test_results_come_in_order_and_a_slot_is_used_again_only_when_its_result_was_left():
    """Threads finish in any order; at no time do two results that the caller may still read share a slot."""
    busy: set[int] = set()
    lock = threading.Lock()

    def make(step: int, slot: int) -> tuple[int, int]:
        with lock:
            assert slot not in busy
            busy.add(slot)
        time.sleep(0.003 * (step * 7 % 3))
        return step, slot

    with read_ahead(make, range(5, 45), n_slots=3, n_threads=4) as results:
        for wanted, (step, slot) in enumerate(results, start=5):
            assert step == wanted
            time.sleep(0.001)
            with lock:
                assert slot in busy
                busy.remove(slot)
    assert wanted == 44
    assert n_readers() == 0


def test_reading_ahead_goes_on_while_the_caller_works():
    made = []
    with read_ahead(lambda step, slot: made.append(step), range(10), n_slots=4, n_threads=2) as results:
        next(results)
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert sorted(made) == [0, 1, 2, 3]  # so many and no more


class FakeCuda:
    """A copy stream and its events on paper: what was recorded, waited for and kept alive."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def event(self) -> "FakeEvent":
        return FakeEvent(self)

    @contextmanager
    def stream(self, _: object) -> Iterator[None]:
        yield

    def current_stream(self, _: object) -> "FakeCuda":
        return self

    def wait_event(self, event: "FakeEvent") -> None:
        self.log.append(("training waits", id(event)))


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.log.append(("copied", id(self)))

    def synchronize(self) -> None:
        self.cuda.log.append(("reader waits", id(self)))

    def query(self) -> bool:
        return False


def test_on_cuda_a_buffer_is_filled_again_only_after_its_copy_and_training_waits_for_it(cache, monkeypatch):
    """No GPU here: the order of the calls, from the reader threads and the caller."""
    cuda, empty, kept = FakeCuda(), torch.empty, []
    monkeypatch.setattr(torch.cuda, "Event", cuda.event)
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", cuda.current_stream)
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory=None, **how: kept.append(pin_memory) or empty(*size, **how)
    )
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(tensor.data_ptr()))
    loader = MixedBatchLoader(cache, replace(DATA, readers=1, read_ahead=2))
    monkeypatch.setattr(loader_module, "copy_stream", lambda device: cuda)
    with loader.stream(0, 6) as stream:
        for rows in stream:
            for tensor in (rows.clean, rows.masked, rows.rank, rows.unreplaced):
                assert tensor is not None
                assert tensor.data_ptr() in kept
    assert kept.count(True) == 4  # two buffers a stage, pinned
    assert stream.n_late == 5  # the copies of all but the first were on their way
    for event in {event for _, event in cuda.log}:
        calls = [what for what, own in cuda.log if own == event]
        assert [what for what in calls if what != "training waits"] == ["reader waits", "copied"] * 3
        waits = [i for i, what in enumerate(calls) if what == "training waits"]
        assert len(waits) == 3
        assert all(calls[:i].count("copied") > n for n, i in enumerate(waits))  # each for a copy that was recorded


def test_memory_is_used_again_when_nobody_has_any_part_of_it():
    memory = Memory()
    first = memory.tensor(4, 3).fill_(1)
    place, part = first.data_ptr(), first[2:]
    del first
    other = memory.tensor(4, 3).fill_(2)
    assert other.data_ptr() != place
    assert part.eq(1).all()
    del part
    assert memory.tensor(4, 5).data_ptr() != place
    again = memory.tensor(4, 3)
    assert again.data_ptr() == place
    assert other.eq(2).all()


def test_a_stream_counts_how_long_its_caller_waited_but_not_for_the_first_rows(cache, monkeypatch):
    loader = MixedBatchLoader(cache, replace(DATA, readers=1, read_ahead=1))
    fill = loader.fill
    monkeypatch.setattr(loader, "fill", lambda *what: time.sleep(0.02) or fill(*what))
    with loader.stream(0, 5) as stream:
        next(stream)
        assert (stream.waited, stream.n_late) == (0, 0)
        list(stream)
    assert stream.waited >= 4 * 0.02
    assert stream.n_late == 4
    loader = MixedBatchLoader(cache, replace(DATA, readers=1, read_ahead=4))
    with loader.stream(0, 20) as stream:
        for _ in stream:
            time.sleep(0.02)  # training, which is slower than reading
    assert stream.waited < 0.1


def test_readers_leave_torch_s_threads_to_the_training(cache):
    before, seen = torch.get_num_threads(), []
    with read_ahead(lambda *_: seen.append(torch.get_num_threads()), range(4), n_slots=2, n_threads=2) as results:
        list(results)
    assert seen == [1] * 4
    assert torch.get_num_threads() == before
    late = []
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert late == [before]


def test_rows_of_a_cache_that_was_opened_unchecked_are_the_same(cache):
    unchecked = ActivationCache.open(cache.path, check=False)
    for io in ("mmap", "pread"):
        one, other = (MixedBatchLoader(each, replace(DATA, io=io)) for each in (cache, unchecked))
        assert all(same(one.read(step), other.read(step)) for step in range(3))
