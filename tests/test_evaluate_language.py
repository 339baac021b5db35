"""Language and oracle: which parents count, and what the perfect dictionary is."""

import numpy as np
import pytest
import torch
from evaluate_fixtures import N_CHILDREN, N_PARENTS, Relation, child_number, planted_language, planted_rows

from evaluate.bench import Bench
from evaluate.controls import oracle_subject
from evaluate.language import Language
from evaluate.metrics.absorption import absorption
from evaluate.oracle import fit_oracle
from evaluate.rows import Rows, class_labels


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


def test_the_oracle_is_scored_on_labelled_text(language):
    subject = oracle_subject(Bench(calibration=language.fit, clean=planted_rows(10, 9), language=language))
    assert subject.held_out is language.test
    assert subject.raw is subject.dictionary
    assert subject.latents(language.test).shape == (language.test.n, len(language.feature_names))
    assert subject.latents(language.test) is subject.latents(language.test)


def test_an_oracle_feature_that_never_occurred_still_fires(language):
    assert language.even.features is not None
    features = language.even.features.copy()
    features[:, 7] = False
    oracle = fit_oracle(Rows(x=language.even.x, features=features))
    codes = oracle.encode(language.test)
    assert language.test.features is not None
    assert ((codes[:, 7] != 0).numpy() == language.test.features[:, 7]).all()
    assert oracle.directions[7].norm() < 1e-3


def test_the_oracles_directions_are_the_planted_ones(language):
    oracle = fit_oracle(language.even)
    for number in (0, child_number(2, 7)):  # children add to their parent, they do not contain it
        effect = oracle.directions[number] * oracle.strength[number]
        others = torch.cat([effect[:number], effect[number + 1 :]])
        assert others.abs().max() < 0.4 * effect[number]
    codes = oracle.encode(language.test)
    assert ((codes != 0).numpy() == language.test.features).all()
