"""First-letter absorption of dictionaries whose answer is known by hand, and its parts against slow ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from spelling_fixtures import (
    N_CHILDREN,
    N_LETTERS,
    halved_sae,
    letter_sae,
    planted_spelling,
    spelling_subject,
)

from evaluate.columns import column_of
from evaluate.metrics.first_letter import COLUMNS, first_letter, guard
from evaluate.names import find
from evaluate.projection import absorbed
from evaluate.rows import Rows
from evaluate.spelling import SpelledWords, Spelling
from evaluate.split_latents import L1, l1_weights, split_latents
from evaluate.subject import Learned

FULL = "first_letter_mean_full_absorption_score"
FRACTION = "first_letter_mean_absorption_fraction_score"


@pytest.fixture(scope="module")
def spelling():
    return planted_spelling()


def test_a_dictionary_without_absorption_scores_zero(spelling):
    found = first_letter(spelling_subject(letter_sae(0), spelling))
    assert found[FULL] == found[FRACTION] == 0
    assert found["first_letter_k1_f1"] == 1
    assert found["first_letter_mean_num_split_features"] == 1
    assert found["first_letter_num_letters"] == found["first_letter_num_found_letters"] == N_LETTERS
    assert found["first_letter_mean_probe_f1"] == 1


@pytest.mark.parametrize("n_absorbed", [1, 5])
def test_absorption_that_is_built_in_scores_as_by_hand(spelling, n_absorbed):
    found = first_letter(spelling_subject(letter_sae(n_absorbed), spelling))
    recall = 1 - n_absorbed / N_CHILDREN
    assert found[FULL] == pytest.approx(n_absorbed / N_CHILDREN)
    assert found[FRACTION] == pytest.approx(n_absorbed / N_CHILDREN)
    assert found["first_letter_found_full_absorption_score"] == pytest.approx(n_absorbed / N_CHILDREN)
    assert found[f"{FULL}@q"] == pytest.approx(n_absorbed / N_CHILDREN)
    assert found["first_letter_k1_f1"] == pytest.approx(2 * recall / (1 + recall))
    assert found["first_letter_mean_num_split_features"] == 1


def test_only_words_that_the_dense_probe_gets_right_count(spelling):
    kind = np.arange(spelling.test.rows.n) % N_CHILDREN
    absorbed_ones = first_letter(spelling_subject(letter_sae(5), replace(spelling, right=spelling.right & (kind < 5))))
    others = first_letter(spelling_subject(letter_sae(5), replace(spelling, right=spelling.right & (kind >= 5))))
    assert absorbed_ones[FULL] == absorbed_ones[FRACTION] == 1
    assert others[FULL] == others[FRACTION] == 0


def test_moving_the_activations_and_the_offset_together_changes_nothing(spelling):
    shift = torch.linspace(-20, 30, spelling.test.rows.x.shape[1])
    moved = [
        SpelledWords(rows=Rows(x=part.rows.x + shift), letters=part.letters) for part in (spelling.train, spelling.test)
    ]
    sae = letter_sae(5)
    with torch.no_grad():
        sae.b_dec.copy_(shift)
        sae.b_enc.sub_(0 if sae.subtract_b_dec else shift @ sae.W_enc)
    found = first_letter(spelling_subject(sae, Spelling.of(*moved)))
    assert found == pytest.approx(first_letter(spelling_subject(letter_sae(5), spelling)))


def test_a_letter_split_over_two_latents_is_not_absorbed(spelling):
    sae = halved_sae(10)
    split = split_latents(Learned(sae=sae), spelling)
    assert [sorted(latents) for latents in split.latents] == [[2 * i, 2 * i + 1] for i in range(N_LETTERS)]
    assert (split.train_f1 == 1).all()
    found = first_letter(spelling_subject(sae, spelling))
    assert found[FULL] == found[FRACTION] == 0
    assert found["first_letter_mean_num_split_features"] == 2


def test_a_dictionary_that_never_fires_scores_zero_and_says_that_it_found_no_letter(spelling):
    sae = letter_sae(5)
    with torch.no_grad():
        sae.threshold = torch.tensor(100.0)
    found = first_letter(spelling_subject(sae, spelling))
    assert found[FULL] == found["first_letter_num_found_letters"] == 0
    assert found["first_letter_k1_f1"] == pytest.approx(2 / (N_LETTERS + 1))  # what saying yes to every word gets
    assert "first_letter_found_full_absorption_score" not in found
    assert not COLUMNS[FULL].random_is_worst


def test_every_number_has_a_column_and_twice_gives_the_same(spelling):
    found = first_letter(spelling_subject(letter_sae(5), spelling))
    assert all(column_of(COLUMNS, name).meaning for name in found)
    assert found == first_letter(spelling_subject(letter_sae(5), spelling))
    assert find("first_letter").needs == ("spelling",)
    assert [name for name, column in COLUMNS.items() if column.claim] == [FULL]


def test_the_guard_asks_for_a_large_model_and_a_wide_sae():
    assert guard(2_000_000_000, 16_384) == ""
    assert "0.16B parameters and the SAE 16,384" in guard(160_000_000, 16_384)
    assert "4,096 latents" in guard(2_000_000_000, 4096)
    assert "unknown number" in guard(0, 65_536)


def test_whether_it_is_meaningful_is_a_column(spelling):
    sae = letter_sae(0)
    assert first_letter(spelling_subject(sae, spelling, 2_000_000_000))["first_letter_is_meaningful"] == 0
    wide = type(sae)(sae.d_model, 16_384, sae.activation)
    with torch.no_grad():
        wide.threshold = torch.tensor(1.5)
    assert first_letter(spelling_subject(wide, spelling, 2_000_000_000))["first_letter_is_meaningful"] == 1
    assert first_letter(spelling_subject(wide, spelling, 900_000_000))["first_letter_is_meaningful"] == 0


def test_the_l1_probe_agrees_with_scipy():
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(2, 300, generator=generator) < torch.tensor([[0.2], [0.6]])
    latents = torch.rand(2, 300, 4, generator=generator) * (torch.rand(2, 300, 4, generator=generator) < 0.3)
    latents[:, :, 0] += labels * torch.rand(2, 300, generator=generator)
    latents[1, :, 3] = 0
    found = l1_weights(latents, labels).numpy()
    for probe in range(2):
        x, on = latents[probe].double().numpy(), labels[probe].numpy()
        size = x.sum(0) / np.maximum((x != 0).sum(0), 1)
        x = np.column_stack([x / np.maximum(size, 1e-12), np.ones(300)])
        weight = np.where(on, 150 / on.sum(), 150 / (~on).sum())

        def objective(both, x=x, on=on, weight=weight):  # w = plus - minus, both >= 0, makes |w| smooth
            w = both[:5] - both[5:]
            return (
                np.mean(weight * np.logaddexp(0, np.where(on, -1, 1) * (x @ w)))
                + L1 * both[[0, 1, 2, 3, 5, 6, 7, 8]].sum()
            )

        slow = minimize(objective, np.zeros(10), bounds=[(0, None)] * 10, options={"ftol": 1e-14, "gtol": 1e-9}).x
        np.testing.assert_allclose(found[probe], (slow[:5] - slow[5:])[:4], atol=2e-3)


def test_absorption_by_projection_agrees_with_a_loop_over_rows():
    generator = torch.Generator().manual_seed(3)
    n, d_sae, d_model = 200, 12, 6
    latents = torch.rand(n, d_sae, generator=generator) * (torch.rand(n, d_sae, generator=generator) < 0.3)
    directions = torch.randn(d_sae, d_model, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(d_model, generator=generator), dim=0)
    own = torch.zeros(d_sae, dtype=torch.bool)
    own[[1, 4]] = True
    along, total = directions @ direction, torch.randn(n, generator=generator)
    cosine = along / directions.norm(dim=1)
    found = absorbed(latents, own, along, cosine, total)
    for row in range(n):
        carried = {j: float(latents[row, j] * along[j]) for j in range(d_sae) if not own[j]}
        top = max(carried, key=lambda j: carried[j])
        whole, mine = float(total[row]), float(sum(latents[row, j] * along[j] for j in (1, 4)))
        silent = all(latents[row, j] == 0 for j in (1, 4))
        assert found.silent[row] == silent
        assert found.full[row] == (silent and cosine[top] >= 0.025 and whole > 0 and carried[top] >= 0.4 * whole)
        taken = sum(sorted((c for j, c in carried.items() if cosine[j] >= 0.1 and c > 0), reverse=True)[:3])
        fraction = 0.0
        if whole > 0 and mine < whole and taken >= 0.4 * whole:
            fraction = 1.0 if mine <= 0 else min(taken, whole - mine) / (min(taken, whole - mine) + mine)
        assert found.fraction[row] == pytest.approx(fraction, abs=1e-5)
    assert 0.05 < found.full.mean() < found.fraction.mean() < 0.95
