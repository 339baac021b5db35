"""The memory plan: what fits together trains together, and what is printed is what is done."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_fixtures import DATA, make_training_cache, run_config

from cache_spec import UserError
from train import passes
from train.kernels import select
from train.loader import MixedBatchLoader
from train.passes import (
    free_memory,
    gib,
    n_parameters,
    needed_bytes,
    parse_memory,
    passes_sentence,
    split,
    state_bytes,
    step_bytes,
    threads_of,
)
from train.step import TrainRun


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    return MixedBatchLoader(make_training_cache(tmp_path_factory.mktemp("passes") / "cache"), DATA)


@settings(deadline=None, max_examples=60)
@given(
    widths=st.lists(st.integers(32, 4096), min_size=1, max_size=30),
    share=st.floats(0.05, 1.2),
    n_threads=st.integers(1, 4),
)
def test_passes_hold_every_run_once_in_order_and_each_fits(loader, widths, share, n_threads):
    configs = [run_config(name=str(i), d_sae=width) for i, width in enumerate(widths)]
    free = int(share * needed_bytes(configs, loader, n_threads))
    try:
        parts = split(configs, loader, n_threads, free)
    except UserError:
        assert any(needed_bytes([config], loader, n_threads) > free for config in configs)
        return
    assert [config for part in parts for config in part] == configs
    assert all(needed_bytes(part, loader, n_threads) <= free for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if share >= 1:
        assert len(parts) == 1


def test_the_sentence_says_how_much_is_needed_and_free_and_how_many_passes():
    runs = [run_config(name=str(i)) for i in range(24)]
    assert passes_sentence([runs[:12], runs[12:]], 31 << 30, 20 << 30) == (
        "24 SAEs need about 31 GiB and 20 GiB are free: 2 passes of 12, each reads the cache"
    )
    assert passes_sentence([runs[:8], runs[8:15]], 31 << 30, 20 << 30).endswith(
        "2 passes of at most 8, each reads the cache"
    )
    assert passes_sentence([runs[:1]], 1 << 29, 20 << 30) == "1 SAE needs about 0.5 GiB and 20 GiB are free: 1 pass"
    assert passes_sentence([runs], 1 << 30, None) == "24 SAEs need about 1 GiB"


def test_the_state_of_a_run_is_what_the_plan_says(loader):
    """Parameters and both moments as they are, and a gradient for each parameter."""
    for arch in ("topk", "batchtopk", "standard"):
        config = run_config(arch, d_sae=512)
        run = TrainRun(config, 8, 60, select("dense", "cpu"))
        x = loader.read(0).clean
        run.step(x, x)
        counted = sum(tensor.numel() for tensor in run.sae.parameters())
        assert counted <= n_parameters(config, 8, 8) < 1.4 * counted
        held = sum(
            t.numel() * t.element_size() for name, t in run.state().items() if name.startswith(("sae.", "adam."))
        )
        assert held + 4 * counted == pytest.approx(state_bytes(config, loader), rel=0.3)


def test_threads_follow_from_the_size_of_a_step_and_from_nothing_beside_it(loader):
    assert threads_of(run_config(d_sae=4096), loader, 16) == 1
    assert threads_of(run_config(d_sae=1 << 22), loader, 16) == 16


def test_sizes_are_read_as_people_write_them():
    assert parse_memory("16G") == parse_memory("16GiB") == parse_memory(" 16gb ") == 16 * 2**30
    assert parse_memory("1.5M") == 3 * 2**19
    assert parse_memory("4096") == 4096
    for text in ("", "much", "16X", "-1G", "0", "inf", "nan"):
        with pytest.raises(UserError, match="--memory is"):
            parse_memory(text)
    assert gib(31 << 30) == "31 GiB"
    assert gib(3 << 29) == "1.5 GiB"


def test_free_memory_is_that_of_the_machine_or_of_its_container(tmp_path, monkeypatch):
    here = free_memory(torch.device("cpu"))
    assert here is None or 1 << 20 < here < 1 << 50
    for name, text in {
        "memory.max": "1000000",
        "memory.current": "700000",
        "memory.stat": "anon 1\ninactive_file 200000\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert passes._left_in_group(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max")
    assert passes._left_in_group(tmp_path) is None
    assert passes._left_in_group(tmp_path / "nowhere") is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    assert free_memory(torch.device("cuda")) == 123 * passes.USABLE // 100
    assert free_memory(torch.device("meta")) is None


def test_a_wider_output_and_a_skip_cost_what_they_hold(loader):
    config = run_config(d_sae=100)
    assert n_parameters(config, 8, 16) - n_parameters(config, 8, 8) == 8 * 100 + 8
    assert n_parameters(replace(config, skip=True), 8, 16) - n_parameters(config, 8, 16) == 8 * 16


def test_a_sparse_step_is_planned_with_what_it_holds_and_auto_with_the_kernel_that_it_takes(loader):
    wide = run_config("batchtopk", d_sae=4096, k=8)
    dense, sparse = (needed_bytes([wide], loader, 1, kernel) for kernel in ("dense", "sparse"))
    assert sparse < dense
    assert needed_bytes([wide], loader, 1) == sparse
    many = replace(wide, k=2048)
    assert needed_bytes([many], loader, 1) == needed_bytes([many], loader, 1, "dense") == dense
    assert needed_bytes([many], loader, 1, "sparse") > sparse
    without = replace(wide, penalties=("auxk=0",))
    assert needed_bytes([without], loader, 1) < sparse
    nested = replace(wide, arch="matryoshka")
    assert needed_bytes([nested], loader, 1) > sparse
    gated = run_config("gated")
    assert needed_bytes([gated], loader, 1) == needed_bytes([gated], loader, 1, "dense")
    with pytest.raises(UserError, match="--kernel sparse cannot train gated"):
        split([gated], loader, 1, 1 << 40, "sparse")


def test_a_jumprelu_s_first_steps_are_dense_whatever_the_kernel(loader):
    config = run_config("jumprelu", d_sae=4096, k=8)
    assert step_bytes(config, loader, "sparse") > step_bytes(config, loader, "dense")


MEASURED = """
import sys
from pathlib import Path
import torch
from train_fixtures import run_config
from train.kernels import select
from train.report import keep_freed_memory
from train.step import TrainRun


def held(what):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(what))


torch.set_num_threads(1)
keep_freed_memory()
x = torch.randn(1024, 64)
small = TrainRun(run_config("topk"), 64, 60, select(sys.argv[1], "cpu"))
small.step(x, x)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = held("VmRSS")
run = TrainRun(run_config(sys.argv[2], d_sae=4096, k=20), 64, 60, select(sys.argv[1], "cpu"))
for _ in range(4):
    run.step(x, x)
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell the peak")
@pytest.mark.parametrize(("kernel", "arch"), [("dense", "topk"), ("sparse", "matryoshka")])
def test_a_process_that_trains_needs_no_more_than_the_plan_says(tmp_path, kernel, arch):
    cache = make_training_cache(tmp_path / "cache", n_train=2048, d_model=64)
    loader = MixedBatchLoader(cache, replace(DATA, batch_size=1024, n_tokens=1024 * 60))
    config = run_config(arch, d_sae=4096, k=20)
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", MEASURED, kernel, arch]
    paths = {"PYTHONPATH": f"{root}:{root / 'tests'}", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=paths, cwd=root)
    planned = state_bytes(config, loader) + step_bytes(config, loader, kernel)
    assert 0.25 * planned < int(done.stdout) * 1024 < planned
