"""The disk: said before the harvest, and when it is full nothing is lost or half-made."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harvest_fixtures import request_for, save_model, write_text
from pipeline_fixtures import files_of

from cache_spec import ActivationCache, DiskFull
from cache_spec.files import Partial
from harvest import run
from harvest.model import load_model

FILLER = Path(__file__).parent / "harvest_filler.py"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(save_model(tmp_path_factory.mktemp("model"))))


def test_the_bytes_announced_are_the_bytes_written(loaded, text, tmp_path, capsys):
    out = tmp_path / "cache"
    run.harvest(loaded, request_for(loaded, text), out)
    announced = float(re.findall(r"disk +([\d.]+) kB needed", capsys.readouterr().out)[0])
    files = [path for path in out.rglob("*") if path.is_file()]
    shards = [path for path in files if path.suffix != ".json"]
    assert announced == pytest.approx(sum(path.stat().st_size for path in shards) / 1000, rel=0.01)


def test_a_dry_run_tells_what_it_would_take_and_does_not_mind_a_full_disk(loaded, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    run.harvest(loaded, request_for(loaded, text), tmp_path / "cache", dry_run=True)
    said = capsys.readouterr().out
    assert "1.00 kB free" in said
    assert "expected time" in said
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_said_before_anything_is_read_or_written(loaded, text, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(run, "make_plan", None)
    with pytest.raises(DiskFull, match=r"needs \d+(\.\d+)? kB more and the disk has 1\.00 kB free"):
        run.harvest(loaded, request_for(loaded, text), tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("n_bytes", [200_000, 400_000])
def test_a_disk_that_fills_up_keeps_what_is_committed_and_the_harvest_goes_on(
    loaded, text, tmp_path, monkeypatch, error, n_bytes
):
    out, whole = tmp_path / "cache", tmp_path / "whole"
    request = request_for(loaded, text)
    real, n_written = Partial.write, 0

    def filling(self, data):
        nonlocal n_written
        n_written += len(memoryview(data).cast("B"))
        if n_written > n_bytes:
            raise OSError(error, os.strerror(error))
        real(self, data)

    with monkeypatch.context() as full:
        full.setattr(Partial, "write", filling)
        with pytest.raises(DiskFull, match=r"is full: .* needs [\d,]+ bytes and [\d,]+ are free; make room and run"):
            run.harvest(loaded, request, out)
    n_there = len(ActivationCache.open(out, allow_partial=True).shards)
    assert 0 < n_there < 6
    assert not list(out.rglob("*.partial"))
    run.harvest(loaded, request, out)
    run.harvest(loaded, request, whole)
    assert files_of(out) == files_of(whole)


def may_mount() -> bool:
    """Whether this machine lets a user have a disk of his own."""
    if shutil.which("unshare") is None:
        return False
    return (
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not may_mount(), reason="needs user namespaces")
def test_a_disk_that_is_really_full(loaded, text, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["unshare", "-rm", sys.executable, str(FILLER), str(folder), loaded.name, str(text)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith(("DiskFull", "2 shards", "the same", "other"))]
    assert said[0].startswith("DiskFull: the disk (or quota) is full: ")
    assert said[0].endswith("make room and run the same command again, it goes on from the last finished shard")
    assert said[1:] == ["2 shards, 0 half-written files", "the same bytes"]
