"""Ctrl-C: once finishes the shard in progress, twice stops at once; a cache resumes after both."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from harvest_fixtures import request_for, save_model, write_text
from pipeline_fixtures import files_of

from cache_spec import ActivationCache
from cache_spec.layout import PLAN
from harvest import run, target
from harvest.model import load_model
from harvest.stopping import catch_stops

ROOT = Path(__file__).parent.parent
SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(save_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, loaded, text):
    out = tmp_path_factory.mktemp("whole") / "cache"
    run.harvest(loaded, request_for(loaded, text), out)
    return files_of(out)


def send(number):
    """To this process; the handler has run when this returns, if it is called in the main thread."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_stops(number, capfd):
    with catch_stops() as stop:
        stop.finish("shard 3")
        assert not stop.asked
        send(number)
        assert stop.asked
        assert capfd.readouterr().err == "\nfinishing shard 3; Ctrl-C again stops at once\n"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_with_nothing_to_finish_the_first_signal_stops(number, capfd):
    with catch_stops() as stop, pytest.raises(KeyboardInterrupt):
        send(number)
    assert not stop.asked
    assert not capfd.readouterr().err


def test_signals_go_where_they_went_before():
    def failing():
        with catch_stops():
            assert [signal.getsignal(number) for number in SIGNALS] != before
            raise ValueError("something else")

    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ValueError, match="something else"):
        failing()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_stops() as stop:
            send(signal.SIGINT)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_caught():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with catch_stops() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


@pytest.mark.parametrize("number", SIGNALS)
def test_once_finishes_the_shard_and_says_how_to_go_on(number, loaded, text, tmp_path, monkeypatch, whole):
    out, real = tmp_path / "cache", target.write_shard

    def interrupted(path, plan, shard, *arrays, **how):
        if shard == 1:
            send(number)
            time.sleep(0.1)
        return real(path, plan, shard, *arrays, **how)

    with monkeypatch.context() as patch:
        patch.setattr(target, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            run.harvest(loaded, request_for(loaded, text), out)
    shards = ActivationCache.open(out, allow_partial=True).shards
    assert shards in ((0, 1), (0, 1, 2), (0, 1, 2, 3))  # what the model had begun by then
    assert str(caught.value) == (
        f"{len(shards)} of 6 shards are in {out}; the same command goes on from shard {len(shards)}"
    )
    assert not list(out.rglob("*.partial"))
    run.harvest(loaded, request_for(loaded, text), out)
    assert files_of(out) == whole


def test_once_in_the_last_shard_finishes_the_cache(loaded, text, tmp_path, monkeypatch, whole):
    out, real = tmp_path / "cache", target.write_shard
    monkeypatch.setattr(
        target, "write_shard", lambda *facts, **how: (facts[2] == 5 and send(signal.SIGINT), real(*facts, **how))[1]
    )
    run.harvest(loaded, request_for(loaded, text), out)
    assert files_of(out) == whole


def test_twice_stops_at_once_though_a_shard_is_being_written(loaded, text, tmp_path, monkeypatch, whole):
    out, real, free, done = tmp_path / "cache", target.write_shard, threading.Event(), threading.Event()

    def stuck(path, plan, shard, *arrays, **how):
        if shard == 1:
            send(signal.SIGINT)
            time.sleep(0.05)
            send(signal.SIGINT)
            free.wait(20)
            real(path, plan, shard, *arrays, **how)
            done.set()
            return
        real(path, plan, shard, *arrays, **how)

    with monkeypatch.context() as patch:
        patch.setattr(target, "write_shard", stuck)
        with pytest.raises(KeyboardInterrupt, match=r"1 of 6 shards are in .*; the same command goes on from shard 1"):
            run.harvest(loaded, request_for(loaded, text), out)
    assert ActivationCache.open(out, allow_partial=True).shards == (0,)
    free.set()  # the thread outlives the harvest here, and commits a whole shard beside the next one
    run.harvest(loaded, request_for(loaded, text), out)
    assert done.wait(20)
    assert files_of(out) == whole


def test_while_planning_the_first_signal_stops(loaded, text, tmp_path, monkeypatch, whole):
    out = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_windows", lambda *facts: send(signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            run.harvest(loaded, request_for(loaded, text), out)
    assert not (out / PLAN).exists()
    run.harvest(loaded, request_for(loaded, text), out)
    assert files_of(out) == whole


def test_the_command_ends_with_130_and_one_sentence(loaded, text, tmp_path):
    out = tmp_path / "cache"
    write_text(text.with_name("long.txt"), 20_000)
    options = {"model": loaded.name, "dataset": text.with_name("long.txt"), "layers": "1", "context": "32", "out": out}
    command = [sys.executable, "-m", "harvest", *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        [*command, "--tokens=400k", "--batch-windows=1"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 60
        while not list(out.glob("_granary/shards/*.json")) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    n_there = len(ActivationCache.open(out, allow_partial=True).shards)
    assert process.returncode == 130, said
    assert said.count("finishing shard") == 1
    assert f"; {n_there} of " in said
    assert f"the same command goes on from shard {n_there}" in said
    assert "Traceback" not in said
