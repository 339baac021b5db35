"""--profile: the trace opens, the parts add up to the steps, and nothing that is trained changes by a bit."""

import gzip
import json
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import DeviceType
from train_fixtures import DATA, contents, make_training_cache, run_config

from train import spans
from train.loader import MixedBatchLoader
from train.profile import PROFILE, DeviceWork, Interval, _device_work, _intervals, bill_of, table
from train.spans import DECODE, ENCODE, GRADIENTS, MIX, PREFIX, READ, SAE_STEP, SELECT, STEP, UPDATE, WAIT, span
from train.sweep import train_sweep

RUNS = [
    run_config("topk"),
    run_config("jumprelu", masked_fraction=0.5),
    run_config("batchtopk", corrupt="gaussian=0.2"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_training_cache(tmp_path_factory.mktemp("profile") / "cache")


def train(cache, out, runs=RUNS, **options):
    return train_sweep(MixedBatchLoader(cache, DATA), runs, out=out, checkpoint_every=20, **options)


def times(printed: str) -> dict[str, float]:
    """The table's first column of numbers."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  part "))
    found = {}
    for line in lines[start + 1 :]:
        if not (row := re.match(r"  (\S.*?) {2,}([\d.]+) ", line)):
            break
        found[row[1]] = float(row[2])
    return found


def trace_of(path) -> list[dict]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


@pytest.mark.parametrize(("kernel", "n_threads"), [("dense", 1), ("sparse", 2)])
def test_training_has_the_same_bits_and_says_where_the_time_went(cache, tmp_path, capsys, kernel, n_threads):
    train(cache, tmp_path / "plain", kernel=kernel, n_threads=n_threads)
    assert capsys.readouterr().out == ""
    train(cache, tmp_path / "seen", kernel=kernel, n_threads=n_threads, profile=True)
    printed = capsys.readouterr().out
    files = contents(tmp_path / "seen")
    (name,) = [name for name in files if name.startswith(PROFILE)]
    del files[name]
    assert files == contents(tmp_path / "plain")
    assert name == f"{PROFILE}/steps_4-13.json.gz"
    assert printed.startswith("profile   steps 4 to 13 of 60, 3 SAEs: ")
    parts = times(printed)
    whole = parts.pop("all")
    assert sum(parts.values()) == pytest.approx(whole, rel=0.01, abs=0.01)
    assert {ENCODE, SELECT, DECODE, GRADIENTS, UPDATE, MIX, SAE_STEP} <= parts.keys()
    assert 0 < float(re.findall(r"threads +([\d.]+)", printed)[0]) <= n_threads
    spans_ = [event for event in trace_of(tmp_path / "seen" / name) if event.get("name", "").startswith(PREFIX)]
    assert sum(event["name"] == PREFIX + STEP and event.get("ph") == "X" for event in spans_) == 10
    assert sum(event["name"] == PREFIX + SAE_STEP and event.get("ph") == "X" for event in spans_) == 30
    summed = sum(event["dur"] for event in spans_ if event["name"] == PREFIX + STEP) / 1e4
    assert summed == pytest.approx(whole, rel=0.05, abs=0.1)


def test_a_second_profile_leaves_the_first_trace_alone(cache, tmp_path, capsys):
    for seed in (0, 1):
        train(cache, tmp_path, [run_config("topk", name=f"seed {seed}", seed=seed)], profile=True)
    traces = sorted((tmp_path / PROFILE).iterdir())
    assert [path.name for path in traces] == ["steps_4-13.json.gz", "steps_4-13_2.json.gz"]
    assert all(trace_of(path) for path in traces)
    assert "steps_4-13_2.json.gz" in capsys.readouterr().out


def test_what_is_left_of_a_run_is_profiled_and_of_a_finished_one_nothing(cache, tmp_path, capsys, caplog):
    runs = [run_config("topk")]
    train(cache, tmp_path / "whole", runs)
    loader = MixedBatchLoader(cache, DATA)

    def broken_off(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        real = loader.fill
        patch.setattr(
            loader, "fill", lambda stage, step, mixtures: (broken_off if step == 57 else real)(stage, step, mixtures)
        )
        with pytest.raises(KeyboardInterrupt):
            train_sweep(loader, runs, out=tmp_path / "late", profile=True)
    assert len(list((tmp_path / "late" / PROFILE).iterdir())) == 1
    capsys.readouterr()
    train(cache, tmp_path / "late", runs, resume=True, profile=True)
    assert re.match(r"profile   steps 60 to 60 of 60, 1 SAEs", capsys.readouterr().out)
    plain = contents(tmp_path / "whole")
    assert {name: data for name, data in contents(tmp_path / "late").items() if name in plain} == plain
    caplog.set_level("INFO")
    train(cache, tmp_path / "late", runs, resume=True, profile=True)
    assert "nothing is left to train" in caplog.text
    assert capsys.readouterr().out == ""


def test_a_sweep_that_fails_while_it_is_profiled_leaves_no_profiler_behind(cache, tmp_path, monkeypatch):
    (facts,) = train(cache, tmp_path, [run_config("topk", lr=1e30)], profile=True)
    assert facts["status"] == "failed"
    assert not torch.autograd.profiler._is_profiler_enabled
    monkeypatch.setattr(
        "train.sweep._Sweep._step", lambda self, entries, rows, pool, read: read() if rows.step < 5 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        train(cache, tmp_path / "broken", profile=True)
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_span_is_nothing_while_no_profiler_runs():
    assert span(ENCODE) is span(UPDATE)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)
    with profiler, span(ENCODE):
        torch.ones(2).add_(1)
    assert [event.part for event in _intervals(profiler.events() or [])] == [ENCODE]
    assert len({*spans.PARTS}) == len(spans.PARTS)


def at(part, thread, start, end):
    return Interval(part=part, thread=thread, start=start, end=end)


def test_a_moment_is_shared_by_the_threads_that_work_in_it():
    bill = bill_of(
        [
            *(at(STEP, 0, 0, 10), at(STEP, 0, 10, 20)),
            at(MIX, 0, 0, 1),
            at(WAIT, 0, 1, 9),
            *(at(SAE_STEP, 1, 1, 5), at(ENCODE, 1, 1, 4), at(SAE_STEP, 2, 1, 3), at(UPDATE, 2, 1, 3)),
            *(at(SAE_STEP, 1, 10, 20), at(SELECT, 1, 12, 20)),
            *(at(READ, 3, 0, 6), at(ENCODE, 1, 25, 30)),
        ]
    )
    assert bill.wall == 20
    assert bill.parts == {MIX: 1, ENCODE: 1 + 1, UPDATE: 1, SAE_STEP: 1 + 2, WAIT: 4, STEP: 1, SELECT: 8}
    assert bill.n_working == (4 + 2 + 10) / 20
    assert bill.reading == 6


@settings(deadline=None)
@given(
    spans_=st.lists(
        st.tuples(
            st.sampled_from([ENCODE, UPDATE, SAE_STEP, WAIT, READ, MIX]),
            st.integers(0, 3),
            st.integers(-5, 25),
            st.integers(0, 15),
        ),
        max_size=12,
    )
)
def test_whatever_the_spans_the_parts_add_up_to_the_steps(spans_):
    bill = bill_of([at(STEP, 0, 0, 20), *(at(part, thread, start, start + n) for part, thread, start, n in spans_)])
    assert sum(bill.parts.values()) == pytest.approx(20)
    assert 0 <= bill.n_working <= 4


def event(name, thread, start, end, kernels=(), device_type=DeviceType.CPU):
    """As torch.autograd.profiler_util.FunctionEvent, in microseconds."""
    return SimpleNamespace(
        name=name,
        thread=thread,
        time_range=SimpleNamespace(start=1e3 * start, end=1e3 * end),
        kernels=[SimpleNamespace(name=kernel, duration=1e3 * duration) for kernel, duration in kernels],
        device_type=device_type,
    )


def test_a_gpu_s_time_belongs_to_the_part_that_launched_it_even_from_autograd_s_thread():
    events = [
        event(PREFIX + STEP, 0, 0, 10),
        event(PREFIX + STEP, 0, 0, 99, device_type=DeviceType.CUDA),  # its shadow on the device
        event(PREFIX + ENCODE, 1, 1, 2, kernels=[(PREFIX + ENCODE, 4)]),
        event("aten::mm", 1, 1, 2, kernels=[("gemm", 4)]),
        event(PREFIX + GRADIENTS, 1, 2, 6),
        event("MmBackward", 7, 3, 4, kernels=[("gemm", 1), ("gemm", 0.5)]),
        event(PREFIX + READ, 5, 0, 5),
        event("aten::copy_", 5, 4, 5, kernels=[("Memcpy HtoD", 0.25)]),
        event("aten::add", 0, 9, 9.5, kernels=[("add", 0.125)]),
        event("aten::add", 0, 12, 13, kernels=[("add", 8)]),  # after the last step
    ]
    work = _device_work(events)
    assert DeviceWork(thread=7, launched=3, milliseconds=0.5) in work
    bill = bill_of(_intervals(events), work)
    assert bill.device == {ENCODE: 4, GRADIENTS: 1.5, READ: 0.25, STEP: 0.125}
    lines = [line.split() for line in table(bill, 2)]
    assert lines[0] == ["part", "ms", "a", "step", "on", "device", "share"]
    rows = {" ".join(line[:-3]): line[-3:] for line in lines[1:]}
    assert rows[ENCODE] == ["0.500", "2.000", "40.0%"]
    assert rows["idle"] == ["0.000", "2.062", "41.2%"]
    assert rows["all"] == ["5.000", "5.000", "100.0%"]
