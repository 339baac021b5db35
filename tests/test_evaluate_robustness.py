"""How far latents move when their context is masked, on displacements made by hand."""

import numpy as np
import pytest
import torch
from evaluate_fixtures import D_MODEL, FIRST_OTHER, planted_language, planted_sae, random_sae

from evaluate.metrics.robustness import COLUMNS, robustness
from evaluate.rows import Rows
from evaluate.subject import CHUNK_ROWS, Bench, Learned, Subject
from train.sae import SparseAutoencoder


def subject_of(sae: SparseAutoencoder, clean: torch.Tensor, masked: torch.Tensor, replaced=None) -> Subject:
    replaced = np.zeros(len(clean), dtype=bool) if replaced is None else replaced
    rows = Rows(x=clean)
    bench = Bench(calibration=rows, clean=rows, masked=Rows(x=masked), replaced=replaced)
    return Subject(name="planted", dictionary=Learned(sae=sae), raw=Learned(sae=sae), bench=bench, held_out=rows)


def active(*features: int, n: int = 6) -> torch.Tensor:
    """[n, D_MODEL] rows that have 1 at the features."""
    x = torch.zeros(n, D_MODEL)
    x[:, list(features)] = 1.0
    return x


def test_a_displacement_that_no_latent_reads_moves_none():
    sae = planted_sae(0)
    with torch.no_grad():
        sae.W_enc[:, FIRST_OTHER:] = 0  # nothing reads or writes the unrelated features
        sae.W_enc[FIRST_OTHER:] = 0
    clean = active(0, 7, 9)
    masked = clean.clone()
    masked[:, FIRST_OTHER] = 3.0
    values = robustness(subject_of(sae, clean, masked))
    assert values["activation_shift"] == pytest.approx(3 / 3**0.5)
    for name in ("latent_shift", "latent_shift_l1", "latent_shift_lost", "latent_shift_gained", "latent_shift_ratio"):
        assert values[name] == 0.0
    assert values["reconstruction_shift"] == 0.0
    assert values["latent_shift_jaccard"] == 1.0
    assert values["latent_shift_cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_swapping_one_of_k_latents(k):
    """All latents are 1: sets overlap in k - 1 of k + 1, and f - f~ has two entries of size 1."""
    clean = active(*range(10, 10 + k))
    masked = active(*range(11, 11 + k))
    values = robustness(subject_of(planted_sae(0), clean, masked))
    assert values["latent_shift_jaccard"] == pytest.approx((k - 1) / (k + 1))
    assert values["latent_shift_lost"] == values["latent_shift_gained"] == pytest.approx(1 / k)
    assert values["latent_shift"] == pytest.approx((2 / k) ** 0.5)
    assert values["latent_shift_l1"] == pytest.approx(2 / k)
    assert values["latent_shift_cosine"] == pytest.approx((k - 1) / k)
    assert values["latent_shift_ratio"] == pytest.approx(1.0)  # latents are the coordinates here
    assert values["reconstruction_shift"] == pytest.approx(values["activation_shift"])
    assert set(values) == set(COLUMNS)


def test_a_shift_of_nothing_is_zero_and_has_no_ratio():
    values = robustness(subject_of(planted_sae(0), active(3, 9), active(3, 9)))
    assert values["latent_shift"] == values["activation_shift"] == 0.0
    assert "latent_shift_ratio" not in values


def test_it_is_the_slow_loop():
    generator = torch.Generator().manual_seed(0)
    clean = 0.4 * torch.randn(80, D_MODEL, generator=generator)
    masked = clean + 0.1 * torch.randn(80, D_MODEL, generator=generator)
    replaced = np.arange(80) % 3 == 0
    subject = subject_of(random_sae(), clean, masked, replaced)
    f, moved = subject.dictionary.encode(Rows(x=clean)), subject.dictionary.encode(Rows(x=masked))
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for i in np.flatnonzero(~replaced):
        on, after = set(np.flatnonzero(f[i])), set(np.flatnonzero(moved[i]))
        found["latent_shift_rows"].append(float(bool(on)))
        if not on:
            continue
        y, y_moved = subject.dictionary.decode(f[i : i + 1]), subject.dictionary.decode(moved[i : i + 1])
        found["latent_shift"].append(float((f[i] - moved[i]).norm() / f[i].norm()))
        found["latent_shift_l1"].append(float((f[i] - moved[i]).abs().sum() / f[i].abs().sum()))
        found["latent_shift_cosine"].append(float(f[i] @ moved[i] / (f[i].norm() * moved[i].norm()).clamp(min=1e-8)))
        found["latent_shift_jaccard"].append(len(on & after) / len(on | after))
        found["latent_shift_lost"].append(len(on - after) / len(on))
        found["latent_shift_gained"].append(len(after - on) / len(on))
        found["activation_shift"].append(float((clean[i] - masked[i]).norm() / clean[i].norm()))
        found["reconstruction_shift"].append(float((y - y_moved).norm() / y.norm()))
    expected = {name: float(np.mean(numbers)) for name, numbers in found.items() if numbers}
    expected["latent_shift_ratio"] = expected["latent_shift"] / expected["activation_shift"]
    assert 0 < expected["latent_shift_jaccard"] < 1
    assert robustness(subject) == pytest.approx(expected, rel=1e-5)


def test_rows_whose_own_token_was_replaced_do_not_count():
    clean, masked = active(3, 9), active(3, 9)
    replaced = np.array([True, True, False, False, False, False])
    masked[:2] = 100.0
    assert robustness(subject_of(planted_sae(0), clean, masked, replaced))["latent_shift"] == 0.0
    assert robustness(subject_of(planted_sae(0), clean, masked, np.ones(6, dtype=bool))) == {}


def test_rows_beyond_one_chunk_count_alike():
    """Rows of one kind in the first chunk and of another in the second: the mean is over all rows."""
    n = CHUNK_ROWS + 1000
    clean, masked = active(3, 9, n=n), active(3, 9, n=n)
    masked[CHUNK_ROWS:, 9] = 0.0
    values = robustness(subject_of(planted_sae(0), clean, masked))
    assert values["latent_shift_lost"] == pytest.approx(0.5 * 1000 / n)


def test_a_dictionary_scored_on_other_text_than_the_caches_is_left_out():
    language = planted_language(200)
    subject = subject_of(planted_sae(0), active(3), active(4))
    other = Subject(
        name="oracle",
        dictionary=subject.dictionary,
        raw=subject.raw,
        bench=subject.bench,
        held_out=language.test,
    )
    assert robustness(other) == {}
