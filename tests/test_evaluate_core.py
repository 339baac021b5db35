"""core: L0 matching, explained variance and splicing, against their definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluate_fixtures import D_MODEL, planted_language, planted_rows, planted_sae, random_sae, subject_of_sae

from cache_spec import HookPoint
from evaluate.controls import subject_of_sae as matched_subject
from evaluate.metrics.core import COLUMNS, DENSITY_EDGES, core
from evaluate.oracle import fit_oracle
from evaluate.rows import Rows
from evaluate.splicing import Splice, model_rows
from evaluate.subject import Bench, Learned, Subject, chunks, matched_threshold
from harvest import embedded
from harvest.model import load_model
from train.activations import JumpReLU, Threshold, TopK
from train.sae import SparseAutoencoder


def bench(n: int = 3000) -> Bench:
    """Calibration and scored rows of the planted world, and masked rows where a third of the tokens is one constant."""
    clean = planted_rows(n, 11)
    replaced = np.arange(n) % 3 == 0
    masked = clean.x.clone()
    masked[torch.from_numpy(replaced)] = 0.3
    return Bench(calibration=planted_rows(n, 12), clean=clean, masked=Rows(x=masked), replaced=replaced)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_matched_threshold_gives_exactly_k_on_the_calibration_rows(k):
    sae, calibration = random_sae(), planted_rows(1000, 0)
    threshold = matched_threshold(sae, calibration, k)
    latents = sae.with_threshold(threshold).encode(calibration.x)
    assert (latents > 0).sum() == k * 1000
    pre = sae.pre_activations(calibration.x).flatten().sort(descending=True).values
    assert pre[k * 1000] < threshold < pre[k * 1000 - 1]


def test_thresholds_per_latent_all_move_by_one_amount():
    sae = SparseAutoencoder(D_MODEL, 64, JumpReLU())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(D_MODEL, 64, generator=generator))
        sae.threshold = torch.nn.Parameter(torch.rand(64, generator=generator))
    calibration = planted_rows(500, 0)
    threshold = matched_threshold(sae, calibration, 4)
    moved = threshold - sae.threshold.detach()
    torch.testing.assert_close(moved, moved[:1].expand(64))
    assert (sae.with_threshold(threshold).encode(calibration.x) > 0).sum() == 4 * 500


def test_an_l0_out_of_reach_turns_every_positive_latent_on():
    sae, calibration = planted_sae(0), planted_rows(200, 0)
    latents = sae.with_threshold(matched_threshold(sae, calibration, D_MODEL)).encode(calibration.x)
    assert ((latents > 0) == (sae.pre_activations(calibration.x) > 0)).all()


def test_matching_changes_what_is_scored_and_keeps_the_raw_numbers_beside():
    data = bench()
    values = core(matched_subject("random", random_sae(), 5, data))
    assert values["l0"] == pytest.approx(5, rel=0.1)
    raw = core(
        Subject(
            name="raw",
            dictionary=Learned(sae=random_sae()),
            raw=Learned(sae=random_sae()),
            bench=data,
            held_out=data.clean,
        )
    )
    assert values["l0_raw"] == raw["l0"] != values["l0"]
    assert values["explained_variance_raw"] == pytest.approx(raw["explained_variance"])


def test_topk_is_scored_as_it_is():
    sae = SparseAutoencoder(D_MODEL, 64, TopK(3))
    subject = matched_subject("topk", sae, 3, bench())
    assert subject.raw is subject.dictionary


def test_an_l1_architecture_has_no_k_to_match():
    subject = matched_subject("any", random_sae(), 0, bench())
    assert subject.raw is subject.dictionary


def test_numbers_follow_their_definitions_on_all_rows_at_once():
    data = bench()
    sae = random_sae()
    values = core(Subject(name="", dictionary=Learned(sae=sae), raw=Learned(sae=sae), bench=data, held_out=data.clean))
    with torch.no_grad():
        x, latents = data.clean.x.double(), sae.encode(data.clean.x)
        y = sae.decode(latents).double()
    error, spread = (x - y).square().sum(1), (x - x.mean(0)).square().sum(1)
    assert values["l0"] == pytest.approx(float((latents != 0).sum(1).double().mean()))
    assert values["mse"] == pytest.approx(float(error.mean()), rel=1e-5)
    assert values["explained_variance"] == pytest.approx(float(1 - error.sum() / spread.sum()), rel=1e-5)
    assert values["explained_variance_legacy"] == pytest.approx(float((1 - error / spread).mean()), rel=1e-5)
    assert values["cossim"] == pytest.approx(float(torch.cosine_similarity(x, y).mean()), rel=1e-4)
    assert values["l2_ratio"] == pytest.approx(float((y.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-5)
    dead = int((latents == 0).all(0).sum())
    assert values["dead_latents"] == dead
    assert values["frac_alive"] == pytest.approx(1 - dead / latents.shape[1])
    assert data.masked is not None
    assert data.replaced is not None
    masked = data.masked.x.double()
    with torch.no_grad():
        masked_error = (masked - sae(data.masked.x).double()).square().sum(1)
    masked_spread = (masked - masked.mean(0)).square().sum(1)
    assert values["explained_variance_masked"] == pytest.approx(
        float(1 - masked_error.sum() / masked_spread.sum()), rel=1e-4
    )
    kept = masked[~data.replaced]
    expected = 1 - masked_error[~data.replaced].sum() / (kept - kept.mean(0)).square().sum()
    assert values["explained_variance_unreplaced"] == pytest.approx(float(expected), rel=1e-4)


def test_masked_and_shifted_rows_get_the_numbers_that_they_would_get_as_clean_rows():
    data, sae = bench(), random_sae()
    other = planted_rows(2000, 13, noise=0.3)
    data = replace(data, shifted=Rows(x=other.x))
    values = core(Subject(name="", dictionary=Learned(sae=sae), raw=Learned(sae=sae), bench=data, held_out=data.clean))
    for where, rows in (("masked", data.masked), ("shifted", data.shifted)):
        assert rows is not None
        alone = Bench(calibration=data.calibration, clean=rows)
        as_clean = core(Subject(name="", dictionary=Learned(sae=sae), raw=Learned(sae=sae), bench=alone, held_out=rows))
        for name in ("l0", "mse", "explained_variance", "cossim"):
            assert values[f"{name}_{where}"] == as_clean[name]


def test_the_oracle_is_not_asked_for_rows_without_labels():
    language = planted_language(500)
    data = replace(bench(600), language=language, shifted=Rows(x=language.shifted.x))
    oracle = fit_oracle(language.even)
    values = core(Subject(name="", dictionary=oracle, raw=oracle, bench=data, held_out=language.test))
    assert "explained_variance" in values
    assert not [name for name in values if name.endswith(("_masked", "_shifted", "_unreplaced"))]


def test_firing_rates_are_counted_in_bins_of_a_quarter_of_a_decade():
    """Of 2,000 tokens, two latents fire on none, one on a single one, one on a tenth, one on more and one on all."""
    n = 2000
    x = torch.zeros(n, 6)
    for latent, n_on in enumerate((0, 0, 1, 200, 300, n)):
        x[:n_on, latent] = 1.0
    sae = SparseAutoencoder(6, 6, Threshold())
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(6))
        sae.W_dec.copy_(torch.eye(6))
        sae.threshold = torch.tensor(0.5)
    rows = Rows(x=x)
    data = Bench(calibration=rows, clean=rows)
    values = core(Subject(name="", dictionary=Learned(sae=sae), raw=Learned(sae=sae), bench=data, held_out=rows))
    histogram = values["density_histogram"]
    assert isinstance(histogram, list)
    assert len(histogram) == len(DENSITY_EDGES) - 1 == 20
    expected = dict.fromkeys(range(20), 0.0)
    for rate in (1 / n, 0.1, 0.15, 1.0):
        expected[min(int((np.log10(rate) + 5) / 0.25), 19)] += 1
    assert histogram == list(expected.values())
    assert values["dead_latents"] == 2.0
    assert values["dense_latents"] == 2.0  # a tenth is not more than a tenth


def test_a_constant_offset_does_not_count_as_explained():
    """The mistake of SAEBench 0.6.0: a denominator about 0 instead of the mean."""
    data = bench()
    shifted = Bench(calibration=data.calibration, clean=Rows(x=data.clean.x + 100))
    sae = planted_sae(0)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(shifted.clean.x.mean(0))
    values = core(
        Subject(name="", dictionary=Learned(sae=sae), raw=Learned(sae=sae), bench=shifted, held_out=shifted.clean)
    )
    assert values["explained_variance"] == pytest.approx(0.0, abs=1e-3)


def test_chunks_are_the_rows_in_order():
    rows = planted_rows(25, 0)
    pieces = list(chunks(rows, 10))
    assert [piece.n for piece in pieces] == [10, 10, 5]
    assert torch.equal(torch.cat([piece.x for piece in pieces]), rows.x)
    assert (np.concatenate([np.asarray(piece.features) for piece in pieces]) == rows.features).all()


def test_without_a_model_there_are_no_model_columns():
    values = core(subject_of_sae(planted_sae(0), planted_language(500)))
    assert not {name for name in values if name.startswith(("ce_", "kl_", "delta_"))}


@pytest.fixture(scope="module")
def splice():
    loaded = load_model("tiny")
    hook_point = HookPoint.parse(embedded.HOOK_POINT)
    tokens = torch.from_numpy(embedded.generate(20, seed=5).tokens)
    replaced = torch.ones_like(tokens, dtype=torch.bool)
    replaced[:, 0] = False
    rows = Rows(x=model_rows(loaded, hook_point, tokens, replaced))
    return Splice(loaded=loaded, hook_point=hook_point, tokens=tokens, replaced=replaced, rows=rows)


def test_the_activation_itself_in_its_own_place_changes_nothing(splice):
    loss, divergence = splice.loss(splice.rows.x)
    assert loss == splice.clean_loss
    assert divergence == 0.0


def test_zeros_ruin_the_model_and_noise_hurts_it(splice):
    ablated_loss, ablated_divergence = splice.ablated
    assert ablated_loss > splice.clean_loss + 1
    noise = torch.randn(splice.rows.x.shape, generator=torch.Generator().manual_seed(0))
    loss, divergence = splice.loss(splice.rows.x + 2 * noise)
    assert splice.clean_loss < loss < ablated_loss
    assert 0 < divergence < ablated_divergence


def test_the_loss_is_the_models_own(splice):
    labels = splice.loaded.model(input_ids=splice.tokens, labels=splice.tokens)
    assert splice.clean_loss == pytest.approx(float(labels.loss), rel=1e-4)


class Exact:
    """A dictionary whose reconstruction is perfect: latents are the activation."""

    def __init__(self, d_model: int) -> None:
        self.directions, self.offset = torch.eye(d_model), torch.zeros(d_model)

    def encode(self, rows: Rows) -> torch.Tensor:
        return rows.x

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def test_scores_are_one_for_a_perfect_reconstruction(splice):
    exact = Exact(splice.rows.x.shape[1])
    data = Bench(calibration=splice.rows, clean=splice.rows, splice=splice, splice_shifted=splice)
    values = core(Subject(name="", dictionary=exact, raw=exact, bench=data, held_out=splice.rows))
    assert values["explained_variance"] == values["ce_loss_score"] == values["kl_div_score"] == 1.0
    assert values["delta_ce"] == values["kl_div_with_sae"] == values["delta_ce_shifted"] == 0.0
    assert values["ce_loss_score_shifted"] == 1.0
    assert set(values) <= set(COLUMNS)
    assert values["ce_loss_with_sae"] == values["ce_loss_without_sae"] == splice.clean_loss
    assert values["ce_loss_with_ablation"] == splice.ablated[0] > splice.clean_loss
