"""Language and controls: which classes are probed, which parents count, and what stands beside trained SAEs."""

import numpy as np
import pytest
import torch
from evaluate_fixtures import (
    N_CHILDREN,
    N_PARENTS,
    ProbeTask,
    Relation,
    child_number,
    planted_language,
    planted_rows,
)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from evaluate import language as language_module
from evaluate.bench import Bench
from evaluate.controls import oracle_subject, untrained_sae
from evaluate.language import MIN_POSITIVES, Language, scores_of
from evaluate.metrics.absorption import absorption
from evaluate.metrics.ood import ood
from evaluate.metrics.probing import probing
from evaluate.oracle import fit_oracle
from evaluate.rows import Rows, class_labels
from evaluate.runs import Run
from train.config import RunConfig
from train.sae import SparseAutoencoder
from train.step import recipe_of


@pytest.fixture(scope="module")
def language() -> Language:
    return planted_language()


def changed(language: Language, **facts: object) -> Language:
    """The same text with other relations, tasks or rows."""
    names = ("fit", "test", "shifted", "even", "relations", "tasks", "value_names", "feature_names", "seed")
    return Language(**{**{name: getattr(language, name) for name in names}, **facts})


def test_labels_are_read_where_the_attribute_is_defined():
    rows = Rows(
        x=torch.zeros(5, 2),
        attributes={"letter": np.array([3, -1, 0, 1, 2])},
        positions={"here": np.array([True, True, False, True, False])},
    )
    chosen, values = class_labels(rows, "letter", "here")
    assert chosen.tolist() == [0, 3]
    assert values.tolist() == [3, 1]
    assert rows.n == 5


def test_every_class_of_a_task_is_frequent_in_all_three_texts(language):
    parts = language.probe_rows["letter"]
    assert {len(rows.labels) for rows in parts.values()} == {N_PARENTS}
    for rows in parts.values():
        assert (rows.labels.sum(0) == 1).all()  # every row belongs to one class
    rare = planted_rows(4000, 3)
    rare.attributes["letter"][rare.attributes["letter"] == 2] = 1  # in the shifted text, one letter is missing
    lacking = changed(language, shifted=rare)
    assert {len(rows.labels) for rows in lacking.probe_rows["letter"].values()} == {N_PARENTS - 1}


def test_a_task_whose_classes_are_all_too_rare_is_left_out(language):
    tasks = (ProbeTask("noun", "noun", "noun"), *language.tasks)
    few = changed(language, tasks=tasks[:1], fit=planted_rows(MIN_POSITIVES, 1))
    assert few.probe_rows == few.dense_scores == {}
    subject = oracle_subject(Bench(calibration=few.fit, clean=few.test, language=few))
    assert probing(subject) == ood(subject) == {}
    assert list(changed(language, tasks=tasks).probe_rows) == ["noun", "letter"]


def test_sampling_is_the_same_every_time_and_keeps_labels_with_their_rows(language, monkeypatch):
    monkeypatch.setattr(language_module, "PROBE_ROWS", 300)
    first, again = changed(language).probe_rows["letter"], changed(language).probe_rows["letter"]
    for part in ("fit", "test", "shifted"):
        assert len(first[part].rows) == 300
        assert (first[part].rows == again[part].rows).all()
        values = language.part(part).attributes["letter"][first[part].rows]
        assert (first[part].labels.argmax(0) == values).all()
    other = changed(language, seed=1).probe_rows["letter"]
    assert (other["fit"].rows != first["fit"].rows).any()


def test_dense_scores_are_those_of_scikit_learn(language):
    noisy = planted_language(noise=1.5)
    found = noisy.dense_scores["letter"]
    scaler = StandardScaler().fit(noisy.fit.x.numpy())
    for value in range(N_PARENTS):
        probe = LogisticRegression(class_weight="balanced", max_iter=2000, tol=1e-8).fit(
            scaler.transform(noisy.fit.x.numpy()), noisy.fit.attributes["letter"] == value
        )
        for part in ("test", "shifted"):
            rows = noisy.part(part)
            scores = probe.decision_function(scaler.transform(rows.x.numpy()))
            expected = roc_auc_score(rows.attributes["letter"] == value, scores)
            assert found[part]["auc"][value] == pytest.approx(expected, abs=1e-4)


def test_scores_are_of_the_sign_of_the_logit():
    labels = np.array([[True, True, False, False]])
    found = scores_of(torch.tensor([[2.0, -1.0, -3.0, 1.0]]), labels)
    assert found["balanced_accuracy"][0] == 0.5
    assert found["auc"][0] == 0.75


def test_a_parents_direction_is_its_own_feature(language):
    (parents,) = language.parents
    assert parents.classes.tolist() == list(range(N_PARENTS))
    torch.testing.assert_close(parents.directions.norm(dim=1), torch.ones(N_PARENTS))
    assert parents.directions[:, :N_PARENTS].argmax(1).tolist() == list(range(N_PARENTS))
    assert (parents.right <= parents.on).all()
    assert (parents.on.sum(0) == 1).all()
    assert (parents.child[parents.on[1]] // N_CHILDREN <= 1).all()


def test_a_parent_that_the_activations_do_not_show_is_left_out(language):
    """SAEBench leaves out a letter whose dense probe has F1 below 0.6."""
    blind = {part: planted_rows(4000, seed) for part, seed in (("fit", 1), ("test", 2))}
    for rows in blind.values():
        rows.x[:, 1:N_PARENTS] = rows.x[:, 1:N_PARENTS].mean(1, keepdim=True)  # letters 1, 2 and 3 look the same
        rows.x[:, child_number(1, 0) : child_number(N_PARENTS, 0)] = 0  # and so do their children
    (parents,) = changed(language, **blind).parents
    assert parents.classes.tolist() == [0]


def test_a_relation_that_never_occurs_has_no_parents(language):
    nowhere = {
        part: Rows(
            x=rows.x,
            attributes={**rows.attributes, "topic": np.full(rows.n, -1)},
            positions=rows.positions,
            features=rows.features,
        )
        for part, rows in (("fit", language.fit), ("test", language.test))
    }
    empty = changed(language, relations=(Relation("cross_token", "topic", "noun", "noun"),), **nowhere)
    assert empty.parents == ()
    subject = oracle_subject(Bench(calibration=empty.fit, clean=empty.test, language=empty))
    assert absorption(subject) == {}


def a_run(**facts: object) -> Run:
    plain = {
        "path": None,
        "name": "run",
        "recipe": "unmasked",
        "arch": "matryoshka",
        "k": 4,
        "d_sae": 64,
        "seed": 3,
        "is_plain": True,
        "is_masked": False,
        "cache_path": "",
        "cache_id": "",
        "hook": "layer_1",
    }
    return Run(**{**plain, **facts})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka", "topk", "jumprelu", "standard"])
def test_an_untrained_sae_is_the_one_its_run_started_from(arch):
    """Same weights as train's own initialisation with that seed; only b_dec comes from other rows."""
    calibration = planted_rows(300, 0)
    sae = untrained_sae(a_run(arch=arch), calibration)
    config = RunConfig(
        name="",
        arch=arch,
        d_sae=64,
        k=4,
        seed=3,
        warmup_steps=1,
        decay_start=1,
        sparsity_warmup_steps=1,
        threshold_start=1,
        threshold_beta=0.9,
        dead_tokens=1,
    )
    recipe = recipe_of(config)
    assert isinstance(sae, SparseAutoencoder)
    assert sae.prefixes == recipe.prefixes
    assert type(sae.activation) is type(recipe.activation)
    assert sae.subtract_b_dec == recipe.subtract_b_dec
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T)
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, recipe.init_norm))
    other = untrained_sae(a_run(arch=arch, seed=4), calibration)
    assert not torch.equal(sae.W_dec, other.W_dec)
    assert (sae.b_dec == 0).all() == (recipe.init_b_dec == "zero")


def test_the_oracle_is_scored_on_labelled_text(language):
    subject = oracle_subject(Bench(calibration=language.fit, clean=planted_rows(10, 9), language=language))
    assert subject.held_out is language.test
    assert subject.raw is subject.dictionary
    assert subject.latents("test").shape == (language.test.n, len(language.feature_names))
    assert subject.latents("test") is subject.latents("test")


def test_an_oracle_feature_that_never_occurred_still_fires(language):
    assert language.even.features is not None
    features = language.even.features.copy()
    features[:, 7] = False
    oracle = fit_oracle(Rows(x=language.even.x, features=features))
    codes = oracle.encode(language.test)
    assert language.test.features is not None
    assert ((codes[:, 7] != 0).numpy() == language.test.features[:, 7]).all()
    assert oracle.directions[7].norm() < 1e-3
