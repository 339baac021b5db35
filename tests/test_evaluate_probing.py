"""k-sparse probing: which rows are drawn, what planted latents get, and the order of oracle, SAE and random."""

import numpy as np
import pytest
import torch
from evaluate_fixtures import (
    D_MODEL,
    N_PARENTS,
    planted_language,
    planted_rows,
    planted_sae,
    random_sae,
    subject_of_tasks,
    turned_language,
    turned_sae,
)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from cache_spec import UserError
from evaluate import probe_scores as probe_scores_module
from evaluate import tasks as tasks_module
from evaluate.language import Language
from evaluate.metrics.ood import ood
from evaluate.metrics.probing import COLUMNS, probing
from evaluate.oracle import fit_oracle
from evaluate.probe_scores import KS, probe_scores
from evaluate.rows import Rows
from evaluate.subject import Bench, Dictionary, Learned, Subject
from evaluate.tasks import (
    FIT_ROWS,
    N_PROBE_SEEDS,
    PENALTIES,
    DenseScores,
    Draws,
    LabelledRows,
    ProbeData,
    balanced_draw,
)

PARTS = ("fit", "test", "shifted")


@pytest.fixture(scope="module")
def language() -> Language:
    return planted_language()


@pytest.fixture(scope="module")
def noisy() -> Language:
    """So much noise that no probe is perfect."""
    return planted_language(noise=1.5)


def probed(dictionary: Dictionary, *tasks: ProbeData, seed: int = 0) -> dict:
    values = probing(subject_of_tasks(dictionary, *tasks, seed=seed))
    assert {name.partition("@")[0] for name in values} <= set(COLUMNS)
    return values


def binary_task(n: int, seed: int, name: str = "task", shifted: bool = True) -> ProbeData:
    """Latent 0 is on for the class, latents 1 and 2 say nothing."""

    def part(number: int) -> LabelledRows:
        generator = np.random.default_rng([seed, number])
        on = generator.random(n) < 0.4
        x = np.stack([on, *(generator.random((2, n)) < 0.5)], axis=1).astype(np.float32)
        return LabelledRows(source=Rows(x=torch.from_numpy(x)), rows=np.arange(n), labels=on[None])

    return ProbeData(name=name, classes=("yes",), fit=part(0), test=part(1), shifted=part(2) if shifted else None)


class Plain:
    """Latents are the dimensions."""

    directions = torch.eye(3)
    offset = torch.zeros(3)

    def encode(self, rows: Rows) -> torch.Tensor:
        return rows.x

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def test_an_oracle_without_a_task_that_it_can_read_says_nothing(language):
    oracle, task = fit_oracle(language.even), binary_task(100, 0)
    bench = Bench(calibration=task.fit.source, clean=task.fit.source, tasks=(task,))
    subject = Subject(name="oracle", dictionary=oracle, raw=oracle, bench=bench, held_out=language.test)
    assert probing(subject) == ood(subject) == {}


def test_a_draw_takes_each_class_equally_and_is_the_same_every_time():
    labels = np.array([np.arange(1000) % 10 == 0, np.arange(1000) % 10 > 6])  # 100, 300 and 600 of neither
    chosen = balanced_draw(labels, 240, np.random.default_rng(0))
    assert labels[:, chosen].sum(1).tolist() == [80, 80]
    assert len(chosen) == len(set(chosen)) == 240
    assert (chosen == balanced_draw(labels, 240, np.random.default_rng(0))).all()
    many = balanced_draw(labels, 900, np.random.default_rng(0))
    assert labels[:, many].sum(1).tolist() == [100, 300]  # a class gives what it has
    everything = balanced_draw(labels[:1], 5000, np.random.default_rng(0))
    assert (everything == np.arange(1000)).all()


def test_probe_seeds_draw_other_fit_rows_and_the_same_test_rows(language):
    (task,) = language.probe_data
    draws, again, other = (Draws.of(task, seed) for seed in (0, 0, 1))
    assert len(draws.fits) == N_PROBE_SEEDS
    for fit in draws.fits:
        assert fit.labels.sum(1).tolist() == [FIT_ROWS // N_PARENTS] * N_PARENTS
    fits = [fit.rows.tolist() for fit in draws.fits]
    assert fits[0] != fits[1] != fits[2]
    assert fits == [fit.rows.tolist() for fit in again.fits]
    assert fits[0] != other.fits[0].rows.tolist()
    assert len(draws.parts["test"].rows) <= tasks_module.TEST_ROWS
    assert (draws.parts["test"].rows == again.parts["test"].rows).all()


def test_rows_taken_keep_their_labels_and_features(language):
    (task,) = language.probe_data
    part = task.test[np.array([5, 2])]
    taken = part.taken()
    assert torch.equal(taken.x, language.test.x[task.test.rows[[5, 2]]])
    assert taken.features is not None
    assert (taken.features[:, :N_PARENTS] == part.labels.T).all()


def test_the_task_of_a_language_has_the_classes_that_are_frequent_in_all_three_parts(language):
    (task,) = language.probe_data
    assert (task.name, task.classes, task.origin) == ("letter", ("L0", "L1", "L2", "L3"), "embedded")
    assert [getattr(task, part).source for part in PARTS] == [language.fit, language.test, language.shifted]
    rare = planted_rows(4000, 3)
    rare.attributes["letter"][rare.attributes["letter"] == 2] = 1  # in the shifted text, one letter is missing
    names = ("fit", "test", "even", "relations", "tasks", "value_names", "feature_names", "seed")
    lacking = Language(**{name: getattr(language, name) for name in names}, shifted=rare)
    assert lacking.probe_data[0].classes == ("L0", "L1", "L3")
    few = Language(**{name: getattr(language, name) for name in names[1:]}, fit=planted_rows(20, 1), shifted=rare)
    assert few.probe_data == ()
    assert probing(Subject(**vars_of(few))) == {}


def vars_of(language: Language) -> dict:
    plain = Learned(sae=planted_sae(0))
    bench = Bench(calibration=language.fit, clean=language.test, tasks=language.probe_data)
    return {"name": "it", "dictionary": plain, "raw": plain, "bench": bench, "held_out": language.test}


def test_two_classes_are_one_question():
    (task,) = turned_language(400).probe_data
    assert task.classes == ("yes",)
    assert (task.test.labels == (task.test.source.x[:, 0] > 0).numpy()).all()


def test_a_latent_that_is_the_class_gets_auc_1_and_is_the_one_chosen():
    values = probed(Plain(), binary_task(1500, 0))
    assert values["sae_top_1_test_auc"] == values["sae_top_1_test_accuracy"] == 1
    assert values["sae_top_1_test_auc_shifted"] == 1
    assert values["probe_seed_sd_1"] == 0
    blind = Plain()
    blind.encode = lambda rows: rows.x * torch.tensor([0.0, 1.0, 1.0])
    assert probed(blind, binary_task(1500, 0))["sae_top_1_test_auc"] == pytest.approx(0.5, abs=0.06)


def test_latents_are_chosen_on_the_fit_text():
    """The first latent of the turned SAE is right on fit text and wrong on test text, the second the other way."""
    (task,) = turned_language().probe_data
    values = probed(Learned(sae=turned_sae()), task)
    assert values["sae_top_1_test_auc"] == pytest.approx(0.1, abs=0.03)
    assert values["sae_top_1_test_auc_shifted"] == pytest.approx(0.9, abs=0.03)


def test_planted_latents_beat_random_ones_and_no_latent_beats_the_dense_probe():
    """With more noise they would: a threshold takes noise away, and a linear probe on the activations cannot."""
    noisy = planted_language(noise=0.4)
    tasks = noisy.probe_data
    planted, random = (probed(Learned(sae=sae), *tasks) for sae in (planted_sae(0), random_sae(D_MODEL)))
    for k in KS:
        name = f"sae_top_{k}_test_auc"
        assert planted["llm_test_auc"] >= planted[name] - 0.005
        assert planted[name] > random[name]
    oracle = probed(fit_oracle(noisy.fit), *tasks)
    assert oracle["sae_top_1_test_auc"] == 1
    assert planted["llm_test_auc"] == random["llm_test_auc"] == oracle["llm_test_auc"]


def test_dense_probes_are_those_of_scikit_learn(noisy):
    (task,) = noisy.probe_data
    (dense,) = DenseScores([task]).of(0)
    for probe_seed, fit in enumerate(dense.draws.fits):
        x = fit.taken().x.numpy()
        scaler = StandardScaler().fit(x)
        for value, part in ((0, "test"), (2, "shifted")):
            probe = LogisticRegression(C=1 / dense.penalty, class_weight="balanced", max_iter=2000, tol=1e-8)
            probe.fit(scaler.transform(x), fit.labels[value])
            rows = dense.draws.parts[part]
            said = probe.decision_function(scaler.transform(rows.taken().x.numpy()))
            found = {score: values[probe_seed, value] for score, values in dense.scores[part].items()}
            assert found["auc"] == pytest.approx(roc_auc_score(rows.labels[value], said), abs=1e-4)
            assert found["accuracy"] == pytest.approx(balanced_accuracy_score(rows.labels[value], said > 0), abs=2e-3)


def test_sparse_probes_are_those_of_scikit_learn(noisy):
    (task,) = noisy.probe_data
    sae = planted_sae(0)
    subject = subject_of_tasks(Learned(sae=sae), task)
    (found,) = probe_scores(subject)
    fit, test = found.dense.draws.fits[1], found.dense.draws.parts["test"]
    latents, scored = (sae.encode(rows.taken().x).detach().numpy() for rows in (fit, test))
    scale = np.array([column[column != 0].mean() if column.any() else 1.0 for column in latents.T])
    for value in (0, 3):
        on = fit.labels[value]
        order = np.argsort(-np.abs(latents[on].mean(0) - latents[~on].mean(0)) / scale)
        for k in (1, 5, 128):
            probe = LogisticRegression(class_weight="balanced", max_iter=3000, tol=1e-8)
            probe.fit(latents[:, order[:k]] / scale[order[:k]], on)
            said = probe.decision_function(scored[:, order[:k]] / scale[order[:k]])
            assert found.scores[k]["test"]["auc"][1, value] == pytest.approx(
                roc_auc_score(test.labels[value], said), abs=1e-3
            )


def test_a_perfect_reconstruction_is_as_good_as_the_activation(noisy):
    class Same(Plain):
        def encode(self, rows: Rows) -> torch.Tensor:
            return rows.x

    values = probed(Same(), *noisy.probe_data)
    for tail in ("", "_shifted"):
        assert values[f"reconstruction_test_auc{tail}"] == values[f"llm_test_auc{tail}"]


def test_the_order_of_the_source_rows_changes_nothing(noisy):
    (task,) = noisy.probe_data
    order = np.random.default_rng(0).permutation(noisy.fit.n)
    back = np.argsort(order)

    def turned(part: LabelledRows) -> LabelledRows:
        return LabelledRows(source=Rows(x=part.source.x[order]), rows=back[part.rows], labels=part.labels)

    fit, test, shifted = (turned(getattr(task, part)) for part in PARTS)
    other = ProbeData(name=task.name, classes=task.classes, fit=fit, test=test, shifted=shifted)
    dictionary = Learned(sae=random_sae())
    assert probed(dictionary, other) == probed(dictionary, task)


def test_reading_in_chunks_changes_nothing(noisy, monkeypatch):
    whole = probed(Learned(sae=random_sae()), *noisy.probe_data)
    monkeypatch.setattr(probe_scores_module, "MAX_NUMBERS", 128 * 100)  # a hundred rows at a time
    assert probed(Learned(sae=random_sae()), *noisy.probe_data) == pytest.approx(whole, abs=1e-5)


def test_with_fewer_latents_than_k_all_are_probed():
    values = probed(Plain(), binary_task(400, 1))
    assert values["sae_top_5_test_auc"] == values["sae_top_16_test_auc"] == values["sae_top_128_test_auc"]


def test_values_are_means_over_tasks_and_a_task_without_shifted_text_counts_on_usual_text_only():
    both, usual = binary_task(600, 2, "both"), binary_task(600, 3, "usual", shifted=False)
    blind = Plain()
    blind.encode = lambda rows: rows.x * torch.tensor([0.0, 1.0, 1.0])
    values = probed(blind, both, usual)
    name = "sae_top_2_test_auc"
    assert values[name] == pytest.approx((values[f"{name}@both"] + values[f"{name}@usual"]) / 2)
    assert values[f"{name}_shifted"] == values[f"{name}_shifted@both"]
    assert f"{name}_shifted@usual" not in values
    alone = probed(blind, usual)
    assert not any("shifted" in name for name in alone)
    assert alone["probe_seed_sd_2"] >= 0


def test_the_seed_decides_the_draws_and_the_same_one_gives_the_same_numbers(noisy):
    dictionary = Learned(sae=random_sae())
    first, again, other = (probed(dictionary, *noisy.probe_data, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert other["sae_top_16_test_auc"] == pytest.approx(first["sae_top_16_test_auc"], abs=0.05)


def test_dense_probes_are_fitted_once_for_all_subjects(noisy):
    bench = Bench(calibration=noisy.fit, clean=noisy.test, tasks=noisy.probe_data)
    assert bench.dense.of(0) is bench.dense.of(0)
    assert bench.dense.of(1) is not bench.dense.of(0)


def test_a_stronger_penalty_is_chosen_where_a_weak_one_overfits():
    """Four hundred rows of three hundred dimensions that each say a little, against three that say all."""

    def penalty(d: int, signal: float) -> float:
        generator = np.random.default_rng(0)
        on = generator.random(400) < 0.5
        x = (generator.standard_normal((400, d)) + signal * on[:, None]).astype(np.float32)
        fit = LabelledRows(source=Rows(x=torch.from_numpy(x)), rows=np.arange(400), labels=on[None])
        return DenseScores([ProbeData(name="task", classes=("yes",), fit=fit, test=fit)]).of(0)[0].penalty

    assert penalty(300, 0.1) > PENALTIES[0]
    assert penalty(3, 5.0) == PENALTIES[-1]  # all are perfect: the strongest


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(UserError, match="2 probe tasks are called 'task'"):
        DenseScores([binary_task(50, 0), binary_task(50, 1)])
