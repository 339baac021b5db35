"""The out-of-distribution gap: its parts, its interval, and what a planted shift gives."""

import numpy as np
import pytest
import torch
from evaluate_fixtures import planted_language, planted_sae, random_sae, subject_of_tasks, turned_language, turned_sae

from evaluate.metrics.ood import COLUMNS, OOD_KS, ood
from evaluate.metrics.probing import probing
from evaluate.rows import Rows
from evaluate.subject import Dictionary, Learned
from evaluate.tasks import LabelledRows, ProbeData


def measured(dictionary: Dictionary, *tasks: ProbeData, seed: int = 0) -> dict:
    values = ood(subject_of_tasks(dictionary, *tasks, seed=seed))
    assert {name.partition("@")[0] for name in values} <= set(COLUMNS)
    return values


class Dimensions:
    """Latents are the first dimensions: a cause and, in usual text, what goes with it."""

    directions = torch.eye(2, 3)
    offset = torch.zeros(3)

    def __init__(self, *read: int) -> None:
        self._read = list(read)

    def encode(self, rows: Rows) -> torch.Tensor:
        return rows.x[:, self._read]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        rebuilt = latents.new_zeros(len(latents), 3)
        rebuilt[:, self._read] = latents
        return rebuilt


def spurious_task(n: int = 1200, noise: float = 0.3, name: str = "task") -> ProbeData:
    """Dimension 0 is the class with noise; dimension 1 is the class on usual text and a coin on shifted text."""

    def part(seed: int, shifted: bool) -> LabelledRows:
        generator = np.random.default_rng(seed)
        on = generator.random(n) < 0.5
        companion = generator.random(n) < 0.5 if shifted else on
        x = np.stack([on, companion, np.zeros(n)], axis=1) + noise * generator.random((n, 3)) ** 2
        source = Rows(x=torch.from_numpy(x.astype(np.float32)))
        return LabelledRows(source=source, rows=np.arange(n), labels=on[None])

    return ProbeData(name=name, classes=("yes",), fit=part(0, False), test=part(1, False), shifted=part(2, True))


def test_gap_and_drop_are_differences_of_the_numbers_of_probing():
    tasks = planted_language(noise=1.5).probe_data
    subject = subject_of_tasks(Learned(sae=random_sae()), *tasks)
    probed: dict = dict(probing(subject))
    found: dict = dict(ood(subject))
    for k in OOD_KS:
        name = f"sae_top_{k}_test_auc"
        gap = probed["llm_test_auc_shifted"] - probed[f"{name}_shifted"]
        assert found[f"ood_gap_to_dense_{k}"] == pytest.approx(gap)
        assert found[f"ood_gap_to_dense_{k}@letter"] == pytest.approx(gap)  # there is one task
        assert found[f"ood_drop_{k}"] == pytest.approx(probed[name] - probed[f"{name}_shifted"])
    assert found["ood_drop_dense"] == pytest.approx(probed["llm_test_auc"] - probed["llm_test_auc_shifted"])
    rebuilt = probed["reconstruction_test_auc_shifted"]
    assert found["ood_gap_to_dense_reconstruction"] == pytest.approx(probed["llm_test_auc_shifted"] - rebuilt)
    assert found["ood_drop_reconstruction"] == pytest.approx(probed["reconstruction_test_auc"] - rebuilt)


def test_a_latent_that_only_goes_with_the_class_loses_it_when_the_text_shifts():
    task = spurious_task()
    companion, cause = (measured(Dimensions(i), task) for i in (1, 0))
    assert companion["ood_drop_1"] == pytest.approx(0.5, abs=0.05)
    assert companion["ood_gap_to_dense_1"] > 0.15
    assert companion["ood_drop_reconstruction"] == pytest.approx(0.5, abs=0.05)
    assert cause["ood_drop_1"] == cause["ood_drop_reconstruction"] == 0
    assert cause["ood_gap_to_dense_1"] <= 0


def test_the_turned_latent_is_seen_by_the_drop():
    (task,) = turned_language().probe_data
    values = measured(Learned(sae=turned_sae()), task)
    assert values["ood_drop_1"] == pytest.approx(0.1 - 0.9, abs=0.05)
    assert values["ood_gap_to_dense_1"] == pytest.approx(1 - 0.9, abs=0.03)


def test_the_interval_holds_the_gap_and_narrows_with_more_rows():
    few, many = (measured(Dimensions(1), spurious_task(n)) for n in (100, 1600))
    for values in (few, many):
        for k in OOD_KS:
            gap, low, high, error = (values[f"ood_gap_to_dense_{k}{end}"] for end in ("", "_low", "_high", "_error"))
            assert low < gap < high
            assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    ratio = few["ood_gap_to_dense_1_error"] / many["ood_gap_to_dense_1_error"]
    assert ratio == pytest.approx(4, rel=0.35)


def test_a_dictionary_that_says_what_the_dense_probe_says_has_no_gap_and_no_spread():
    """Both are right about every row, so no resample tells them apart."""
    values = measured(Learned(sae=planted_sae(0)), *planted_language(noise=0.01).probe_data)
    for k in OOD_KS:
        assert values[f"ood_gap_to_dense_{k}"] == values[f"ood_gap_to_dense_{k}_error"] == 0
        assert values[f"ood_drop_{k}"] == 0


def test_the_same_seed_gives_the_same_interval_and_tasks_are_resampled_apart():
    task = spurious_task(200)
    assert measured(Dimensions(1), task) == measured(Dimensions(1), spurious_task(200))
    other = measured(Dimensions(1), task, seed=1)
    assert other["ood_gap_to_dense_1_low"] != measured(Dimensions(1), task)["ood_gap_to_dense_1_low"]
    twice = measured(Dimensions(1), task, spurious_task(200, name="again"))
    alone = measured(Dimensions(1), task)
    assert twice["ood_gap_to_dense_1_error"] == pytest.approx(alone["ood_gap_to_dense_1_error"] / np.sqrt(2), rel=0.1)


def test_tasks_without_shifted_text_are_left_out():
    task = spurious_task(300)
    usual = ProbeData(name="usual", classes=("yes",), fit=task.fit, test=task.test)
    assert measured(Dimensions(1), usual) == {}
    assert measured(Dimensions(1), task, usual) == measured(Dimensions(1), task)
