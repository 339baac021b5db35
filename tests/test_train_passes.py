"""The memory plan: what fits together trains together, and what is printed is what is done."""

from dataclasses import replace

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
