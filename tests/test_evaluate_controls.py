"""Controls: each is what it says, and those that are the same are measured once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluate.controls import (
    kinds_of,
    mean_l0,
    permuted_sae,
    same_starts,
    subject_of_sae,
    untrained_sae,
    with_any_threshold,
)
from evaluate.rows import Rows
from evaluate.runs import Run
from evaluate.subject import Bench, Learned
from train.config import RunConfig
from train.kernels._select import select
from train.names import available
from train.sae import geometric_median
from train.step import TrainRun

D_MODEL, D_SAE, NORM = 8, 64, 3.0


def run_of(arch: str = "batchtopk", **facts: object) -> Run:
    plain = Run(
        path=Path(arch),
        name=arch,
        recipe="unmasked",
        arch=arch,
        k=4,
        d_sae=D_SAE,
        seed=1,
        is_plain=True,
        is_masked=False,
        control="",
        cache_path="",
        cache_id="c",
        hook="layer_1",
        norm_factor=NORM,
    )
    return replace(plain, **facts)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Rows(x=NORM * torch.randn(4096, D_MODEL, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("arch", available("architectures"))
def test_an_untrained_sae_is_what_training_starts_from(arch, rows):
    """In the units of raw rows it does what the trainer's own SAE does on normalised ones."""
    config = RunConfig(
        name=arch, arch=arch, d_sae=D_SAE, k=4, seed=1, warmup_steps=0, decay_start=9, sparsity_warmup_steps=0,
        threshold_start=9, threshold_beta=0.9, dead_tokens=99,
    )  # fmt: skip
    start = TrainRun(config, D_MODEL, 10, select("dense", "cpu"))
    start.start_at(rows.x / NORM)
    expected = NORM * start.sae(rows.x / NORM)
    torch.testing.assert_close(untrained_sae(run_of(arch), rows)(rows.x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", available("architectures"))
def test_every_untrained_sae_can_have_any_l0(arch, rows):
    sae = with_any_threshold(untrained_sae(run_of(arch), rows))
    subject = subject_of_sae("random", sae, 4, Bench(calibration=rows, clean=rows))
    assert mean_l0(subject.dictionary, rows) == pytest.approx(4, rel=0.02)


def test_b_dec_starts_where_the_run_says(rows):
    for start, expected in (
        ("zero", torch.zeros(D_MODEL)),
        ("mean", rows.x.mean(0)),
        ("median", geometric_median(rows.x)),
    ):
        sae = untrained_sae(run_of(init_b_dec=start), rows)
        torch.testing.assert_close(sae.b_dec, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["batchtopk", "jumprelu", "topk", "gated"])
def test_a_permuted_decoder_keeps_the_encoder_and_moves_every_row(arch, rows):
    sae = untrained_sae(run_of(arch), rows)
    before = sae.W_dec.clone()
    other = permuted_sae(sae, 0)
    assert torch.equal(sae.W_dec, before)
    assert torch.equal(other.encode(rows.x), sae.encode(rows.x))
    assert not (other.W_dec == sae.W_dec).all(1).any()
    assert sorted(map(tuple, other.W_dec.tolist())) == sorted(map(tuple, sae.W_dec.tolist()))
    assert torch.equal(permuted_sae(sae, 0).W_dec, other.W_dec)
    assert not torch.equal(permuted_sae(sae, 1).W_dec, other.W_dec)


def test_controls_stand_beside_the_largest_dictionary_and_two_seeds_plain_runs_first():
    runs = [run_of(seed=seed, is_plain=plain, name=f"{seed}{plain}") for seed in range(5) for plain in (False, True)]
    runs += [run_of(d_sae=32, seed=9), run_of(k=8, is_plain=False)]
    found = kinds_of(runs)
    assert [[(run.k, run.d_sae, run.seed, run.is_plain) for run in group] for group in found] == [
        [(4, D_SAE, seed, True) for seed in range(2)],
        [(8, D_SAE, 1, False)],
    ]


def test_architectures_that_start_from_the_same_weights_share_their_untrained_saes(rows):
    runs = [run_of(arch) for arch in ("matryoshka", "batchtopk", "jumprelu", "topk", "standard", "p_anneal")]
    runs = [replace(run, k=0) if run.arch in ("standard", "p_anneal") else run for run in runs]
    found = {name for name, _ in same_starts(kinds_of(runs))}
    assert found == {"batchtopk, matryoshka", "jumprelu", "topk", "standard", "p_anneal"}
    one, other = (untrained_sae(run_of(arch), rows) for arch in ("batchtopk", "matryoshka"))
    assert torch.equal(one(rows.x), other(rows.x))
    apart = [run_of("batchtopk", seed=2), run_of("matryoshka", seed=1)]
    assert len(same_starts(kinds_of(apart))) == 2


def test_l0_counts_what_is_on(rows):
    sae = untrained_sae(run_of("topk"), rows)
    assert mean_l0(Learned(sae=sae), rows) == pytest.approx(float((sae.encode(rows.x) != 0).sum(1).float().mean()))
