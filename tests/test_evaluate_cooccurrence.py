"""How latents fire together: counts against scikit-learn and slow loops, and dictionaries whose answer is known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluate_fixtures import planted_language, planted_sae, random_sae, subject_of_sae
from sklearn.metrics import jaccard_score

from evaluate import cofiring
from evaluate.cofiring import (
    HISTOGRAM_EDGES,
    MIN_EXPECTED,
    MIN_FIRING,
    count_cofiring,
    jaccard_histogram,
    jaccard_statistics,
    pmi_statistics,
)
from evaluate.language import EVERYWHERE
from evaluate.metrics.cooccurrence import COLUMNS, cooccurrence
from evaluate.rows import Rows
from evaluate.subject import CHUNK_ROWS, Bench, Subject


class Given:
    """A dictionary whose latents are the rows themselves."""

    def __init__(self, d_sae: int) -> None:
        self.directions, self.offset = torch.eye(d_sae), torch.zeros(d_sae)

    def encode(self, rows: Rows) -> torch.Tensor:
        return rows.x

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def firing(n: int, rates: list[float], seed: int = 0) -> np.ndarray:
    """[n, d_sae] booleans, latents independent."""
    return np.random.default_rng(seed).random((n, len(rates))) < np.array(rates)


def counted(on: np.ndarray, seed: int = 0) -> cofiring.Cofiring:
    return count_cofiring(Given(on.shape[1]), Rows(x=torch.from_numpy(2.5 * on.astype(np.float32))), seed)


def test_jaccard_is_scikit_learns_and_its_statistics_are_over_pairs():
    on = firing(400, [0.3, 0.2, 0.1, 0.05, 0.5])
    on[:, 4] &= on[:, 0]
    found = jaccard_statistics(counted(on))
    pairs = list(itertools.combinations(range(5), 2))
    plain = [jaccard_score(on[:, i], on[:, j]) for i, j in pairs]
    rate = on.mean(0)
    chance = [rate[i] * rate[j] / (rate[i] + rate[j] - rate[i] * rate[j]) for i, j in pairs]
    largest = [max(value for pair, value in zip(pairs, plain, strict=True) if i in pair) for i in range(5)]
    assert found["jaccard_mean"] == pytest.approx(np.mean(plain))
    assert found["jaccard_mean_independent"] == pytest.approx(np.mean(chance))
    assert found["jaccard_excess"] == pytest.approx(np.mean(plain) - np.mean(chance))
    assert found["jaccard_lift"] == pytest.approx(np.mean(plain) / np.mean(chance))
    assert found["jaccard_p99"] == pytest.approx(np.quantile(plain, 0.99))
    assert found["jaccard_p999"] == pytest.approx(np.quantile(plain, 0.999))
    assert found["jaccard_max_mean"] == pytest.approx(np.mean(largest))


def test_pmi_is_the_slow_loop_over_pairs_that_are_expected_to_meet():
    on = firing(500, [0.3, 0.2, 0.1, 0.05, 0.04])
    on[:, 1] &= ~on[:, 0]  # expected on some 25 rows, and never seen together
    values = []
    for i, j in itertools.combinations(range(5), 2):
        together, expected = (on[:, i] & on[:, j]).sum(), on[:, i].sum() * on[:, j].sum() / len(on)
        if expected >= MIN_EXPECTED:
            values.append(np.log((together + 0.5) / (expected + 0.5)))
    assert 3 < len(values) < 10
    found = pmi_statistics(counted(on))
    assert found["pmi_mean"] == pytest.approx(np.mean(values))
    assert found["pmi_p99"] == pytest.approx(np.quantile(values, 0.99))
    assert pmi_statistics(counted(firing(300, [0.05, 0.05]))) == {}


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_independent_latents_have_a_lift_of_one_however_often_they_fire(rate):
    found = jaccard_statistics(counted(firing(20000, [rate] * 40)))
    assert found["jaccard_lift"] == pytest.approx(1.0, abs=0.05)
    assert found["jaccard_mean"] == pytest.approx(rate / (2 - rate), rel=0.05)


def test_latents_that_always_fire_together_and_never_do():
    on = firing(1000, [0.2, 0.2])
    on = np.stack([on[:, 0], on[:, 0], ~on[:, 0]], axis=1)
    found = jaccard_statistics(counted(on))
    assert found["jaccard_mean"] == pytest.approx(1 / 3)
    assert found["jaccard_max_mean"] == pytest.approx(2 / 3)
    shares = jaccard_histogram(counted(on))
    assert (shares[0], shares[-1], sum(shares)) == pytest.approx((2 / 3, 1 / 3, 1.0))


def test_the_histogram_has_every_pair_once():
    on = firing(600, [0.4, 0.3, 0.2, 0.1, 0.05, 0.05])
    plain = [jaccard_score(on[:, i], on[:, j]) for i, j in itertools.combinations(range(6), 2)]
    expected = np.histogram(plain, HISTOGRAM_EDGES)[0] / len(plain)
    assert jaccard_histogram(counted(on)) == pytest.approx(expected.tolist())


def test_latents_that_hardly_fire_are_left_out():
    on = np.zeros((100, 4), dtype=bool)
    on[:MIN_FIRING, 0] = on[:MIN_FIRING, 2] = on[: MIN_FIRING - 1, 1] = True
    counts = counted(on)
    assert counts.firing.tolist() == [MIN_FIRING] * 2
    assert jaccard_statistics(counts)["jaccard_mean"] == 1.0
    one = counted(on[:, :2])
    assert jaccard_statistics(one) == pmi_statistics(one) == {}
    assert sum(jaccard_histogram(one)) == 0.0


def test_of_too_many_latents_a_sample_is_counted_that_the_seed_decides(monkeypatch):
    monkeypatch.setattr(cofiring, "MAX_LATENTS", 6)
    generator = np.random.default_rng(0)
    on = np.stack([generator.permutation(np.arange(500) < 50 + 10 * i) for i in range(20)], axis=1)
    counts, again, other = counted(on, 1), counted(on, 1), counted(on, 2)
    assert torch.equal(counts.together, again.together)
    assert not torch.equal(counts.firing, other.firing)
    sizes = on.sum(0).tolist()
    chosen = [sizes.index(int(size)) for size in counts.firing]
    plain = [[int((on[:, i] & on[:, j]).sum()) for j in chosen] for i in chosen]
    assert counts.together.tolist() == plain


def test_rows_beyond_one_chunk_are_counted():
    on = firing(CHUNK_ROWS + 500, [0.3, 0.2, 0.4])
    assert counted(on).together.tolist() == (on.T.astype(int) @ on.astype(int)).tolist()


def with_masked(subject: Subject, masked: Rows, replaced: np.ndarray) -> Subject:
    return replace(subject, bench=replace(subject.bench, masked=masked, replaced=replaced), _latents={})


def test_masked_rows_have_columns_of_their_own():
    language = planted_language(1500)
    plain = subject_of_sae(planted_sae(0), language)
    replaced = np.arange(1500) % 3 == 0
    masked = Rows(x=torch.where(torch.from_numpy(replaced)[:, None], torch.ones(1), language.test.x))
    values = cooccurrence(with_masked(plain, masked, replaced))
    alone = cooccurrence(plain)
    assert alone == {name: value for name, value in values.items() if name in alone}
    for suffix, x in (("_masked", masked.x), ("_unreplaced", language.test.x[~replaced])):
        expected = jaccard_statistics(count_cofiring(plain.dictionary, Rows(x=x), 0))
        assert {name: values[f"{name}{suffix}"] for name in expected} == expected
    assert values["jaccard_histogram_masked"] != values["jaccard_histogram"]  # every latent is on in the replaced rows
    assert set(values) <= set(COLUMNS)


def test_labelled_text_is_counted_on_its_even_sample():
    language = planted_language(1000)
    even = np.arange(1000) < 600
    test = replace(language.test, positions={**language.test.positions, EVERYWHERE: even})
    subject = subject_of_sae(planted_sae(0), replace(language, test=test))
    expected = jaccard_statistics(count_cofiring(subject.dictionary, Rows(x=test.x[:600]), 0))
    assert {name: cooccurrence(subject)[name] for name in expected} == expected


def test_only_rows_of_the_cache_itself_are_compared_with_its_masked_rows():
    language = planted_language(800)
    bench = Bench(calibration=language.fit, clean=language.fit, masked=language.fit, replaced=np.zeros(800, dtype=bool))
    subject = replace(subject_of_sae(planted_sae(0), language), bench=bench)
    assert not [name for name in cooccurrence(subject) if "masked" in name]


def test_a_perfect_dictionary_has_less_lift_than_a_random_one():
    language = planted_language(2000)
    good, poor = (cooccurrence(subject_of_sae(sae, language)) for sae in (planted_sae(0), random_sae()))
    assert float(good["jaccard_lift"]) < float(poor["jaccard_lift"])  # pyright: ignore[reportArgumentType]
    assert not any(column.claim for column in COLUMNS.values())
    assert sum(bool(column.short) for column in COLUMNS.values()) <= 4
