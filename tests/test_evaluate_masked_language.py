"""What clean and masked text still hold of parents and children, in worlds where that is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluate_fixtures import (
    D_MODEL,
    N_CHILDREN,
    N_PARENTS,
    child_number,
    planted_language,
    planted_rows,
    planted_sae,
    subject_of_sae,
)
from sklearn.metrics import matthews_corrcoef

from cache_spec.hook_point import HookPoint
from evaluate import masked_language as module
from evaluate.language import EVERYWHERE, Language
from evaluate.masked_language import (
    MaskedLanguage,
    Reader,
    changes,
    coactivation,
    make_masked_language,
)
from evaluate.metrics.cooccurrence import COLUMNS, cooccurrence
from evaluate.probes import f1_score, one_hot
from evaluate.rows import Rows
from evaluate.store import Store
from evaluate.subject import Subject
from harvest import embedded
from harvest.model import activations, load_model

N = 9600


@pytest.fixture(scope="module")
def language() -> Language:
    return planted_language(N, family="cross_token")


@pytest.fixture(autouse=True)
def few_rows_a_probe(monkeypatch):
    """The planted children are orthogonal, so few rows tell them apart."""
    monkeypatch.setattr(module, "CHILD_ROWS", 128)


def planted_masking(language: Language, *, lost: str) -> MaskedLanguage:
    """Every fourth token is replaced, and every other one of the rest loses what `lost` names.

    A replaced row holds nothing of its own.
    """
    clean = planted_rows(4000, 7)
    number = np.arange(4000)
    replaced = number % 4 == 0
    x = clean.x.clone()
    x[torch.from_numpy(replaced)] = 0.0
    half = torch.from_numpy(number % 2 == 1)
    if lost == "child":
        x[half, N_PARENTS : child_number(N_PARENTS - 1, N_CHILDREN - 1) + 1] = 0.0
    if lost == "parent":
        x[half, :N_PARENTS] = 0.0
    return MaskedLanguage(clean=clean, masked=replace(clean, x=x), replaced=replaced, language=language)


@pytest.mark.parametrize("seed", range(5))
def test_coactivation_is_the_slow_loop(seed):
    generator = np.random.default_rng(seed)
    parent = generator.integers(3, size=300)
    child = np.where(generator.random(300) < 0.3, -1, 10 * parent + generator.integers(4, size=300))
    held_parent, held_child = generator.random(300) < 0.7, generator.random(300) < 0.6
    held_child[child == 21] = False
    found = coactivation(held_parent, held_child, parent, child)

    given_parent, given_child, phi = [], [], []
    for p in range(3):
        rows = [i for i in range(300) if parent[i] == p]
        a = [i for i in rows if held_parent[i]]
        b = [i for i in rows if held_child[i] and child[i] >= 0]
        both = set(a) & set(b)
        given_parent.append(len(both) / len(a))
        given_child.append(len(both) / len(b))
        correlations = []
        for c in (10 * p + k for k in range(4)):
            if c != 21:
                correlations.append(matthews_corrcoef(held_parent & (parent == p), held_child & (child == c)))
        phi.append(np.mean(correlations))
    assert found == pytest.approx(
        {
            "child_given_parent": np.mean(given_parent),
            "parent_given_child": np.mean(given_child),
            "phi": np.mean(phi),
            "parent_rate": held_parent.mean(),
            "child_rate": held_child[child >= 0].mean(),
        }
    )


def test_what_has_no_rows_is_left_out():
    none, some = np.zeros(4, dtype=bool), np.array([0, 0, 1, 1])
    assert coactivation(none, none, some, np.array([-1, -1, -1, -1])) == {"parent_rate": 0.0}
    assert coactivation(none[:0], none[:0], some[:0], some[:0]) == {}


def test_a_token_that_is_masked_loses_both_and_the_coactivation_stays(language):
    values = planted_masking(language, lost="").coactivation
    assert values["child_given_parent_cross_token_clean"] == pytest.approx(0.8, abs=0.02)
    for quantity in ("child_given_parent", "parent_given_child"):
        assert values[f"{quantity}_cross_token_masked"] == pytest.approx(
            values[f"{quantity}_cross_token_clean"], abs=0.01
        )
    for quantity in ("parent_rate", "child_rate"):
        assert values[f"{quantity}_cross_token_clean"] > 0.98
        assert values[f"{quantity}_cross_token_masked"] == pytest.approx(0.75, abs=0.02)
        assert values[f"{quantity}_cross_token_kept"] > 0.98


@pytest.mark.parametrize(
    ("lost", "child_given_parent", "parent_given_child"), [("child", 0.8 / 3, 1.0), ("parent", 0.8, 1 / 3)]
)
def test_what_masking_takes_from_one_of_the_two_shows(language, lost, child_given_parent, parent_given_child):
    """Of the three rows in four that keep their token two have an odd number, and lose it."""
    values = planted_masking(language, lost=lost).coactivation
    assert values["child_given_parent_cross_token_kept"] == pytest.approx(child_given_parent, abs=0.02)
    assert values["parent_given_child_cross_token_kept"] == pytest.approx(parent_given_child, abs=0.02)
    change = changes(values, ("cross_token", "two_token"), ("phi", "parent_given_child"))
    assert set(change) == {"phi_cross_token_change", "parent_given_child_cross_token_change"}
    assert change["phi_cross_token_change"] < -0.02
    expected = values["parent_given_child_cross_token_masked"] - values["parent_given_child_cross_token_clean"]
    assert change["parent_given_child_cross_token_change"] == expected


def test_absorption_shows_in_the_latents_and_not_in_the_data(language):
    """12 of 40 children silence their parent: P(parent | child) is 0.7, and of 100 tokens of a parent its latent is on
    in 20 without a child and 56 with one."""
    masked = planted_masking(language, lost="")
    subject = subject_of_sae(planted_sae(12), language)
    values = cooccurrence(replace(subject, bench=replace(subject.bench, masked_language=masked)))
    assert values["data_parent_given_child_cross_token_clean"] == pytest.approx(1.0, abs=0.01)
    assert values["latent_parent_given_child_cross_token_clean"] == pytest.approx(0.7, abs=0.03)
    assert values["latent_child_given_parent_cross_token_clean"] == pytest.approx(56 / 76, abs=0.03)
    assert values["latent_child_rate_cross_token_clean"] == pytest.approx(1.0, abs=0.01)
    assert values["latent_child_rate_cross_token_kept"] == pytest.approx(1.0, abs=0.01)
    assert set(values) <= set(COLUMNS)


def test_the_data_is_the_same_for_every_dictionary_and_the_oracle_reads_no_masked_rows(language):
    masked = planted_masking(language, lost="child")
    one, other = (subject_of_sae(planted_sae(n), language) for n in (0, 12))
    data = [
        {name: value for name, value in cooccurrence(subject).items() if name.startswith("data_")}
        for subject in (
            replace(one, bench=replace(one.bench, masked_language=masked)),
            replace(other, bench=replace(other.bench, masked_language=masked)),
            Subject(
                name="oracle",
                dictionary=one.dictionary,
                raw=one.raw,
                bench=replace(one.bench, clean=language.fit, masked_language=masked),
                held_out=language.test,
            ),
        )
    ]
    assert data[0] == data[1] == data[2] != {}


def test_the_threshold_of_a_probe_gives_the_base_rate_and_lies_in_the_gap():
    x = torch.tensor([[9.0], [7.0], [3.0], [2.0], [1.0]])
    values = np.array([4, 4, 5, 5, 5])
    reader = Reader.calibrated(np.array([4, 5]), torch.tensor([[1.0], [-1.0]]), x, values)
    assert reader.threshold.tolist() == [5.0, -5.0]
    assert reader.holds(x, values).tolist() == [True] * 5
    assert reader.holds(x, np.array([5, -1, 4, 5, -1])).tolist() == [False, False, False, True, False]
    noisy = Reader.calibrated(np.array([4]), torch.tensor([[1.0]]), x, np.array([4, 5, 4, 5, 5]))
    assert noisy.holds(x, np.full(5, 4)).sum() == 2


def test_probes_fitted_on_samples_read_the_children(language, monkeypatch):
    monkeypatch.setattr(module, "CHILD_ROWS", 1024)
    masked = planted_masking(language, lost="")
    (pairs,) = masked.pairs
    assert len(pairs.children.classes) > 100
    assert (pairs.owner == pairs.children.classes // N_CHILDREN).all()
    test = language.test
    reads = (test.x @ pairs.children.directions.T >= pairs.children.threshold).T.numpy()
    assert f1_score(reads, one_hot(test.attributes["noun"], pairs.children.classes)).min() > 0.97


@pytest.mark.parametrize(("n_own", "n_rows"), [(5, 40), (30, 40), (0, 40), (95, 40), (100, 40), (30, 100)])
def test_a_sample_holds_its_class_up_to_a_half_and_has_one_size(n_own, n_rows):
    own = np.arange(100) < n_own
    rows = module._sample(own, n_rows, np.random.default_rng(0))
    assert len(set(rows.tolist())) == n_rows
    assert own[rows].sum() == max(min(n_own, n_rows // 2), n_rows - (100 - n_own))


def test_the_text_is_masked_and_both_variants_are_the_models_own_activations(tmp_path, language, monkeypatch):
    monkeypatch.setattr(module, "N_DOCUMENTS", 12)
    loaded, hook_point = load_model("tiny"), HookPoint.parse(embedded.HOOK_POINT)
    spoken = replace(language, relations=embedded.RELATIONS)
    how = {"seed": 3, "mask_token": 2, "mask_prob": 0.4, "store": Store(tmp_path)}
    runs: list[torch.Tensor] = []

    def watched(*args):
        runs.append(args[1])
        return activations(*args)

    monkeypatch.setattr("evaluate.splicing.activations", watched)
    made = make_masked_language(loaded, hook_point, spoken, **how)
    clean, masked = runs
    again = make_masked_language(loaded, hook_point, spoken, **how)
    assert len(runs) == 2  # from the store
    assert torch.equal(again.masked.x, made.masked.x)
    assert (again.replaced == made.replaced).all()

    changed = (clean != masked).numpy()
    special = np.isin(clean, loaded.special_ids)
    assert special.any()
    assert not changed[special].any()
    assert (masked[torch.from_numpy(changed)] == 2).all()
    assert changed[~special].mean() == pytest.approx(0.4, abs=0.06)
    corpus = embedded.generate(12, module.derive_seed("evaluate/masked language/text", 3))
    keep = np.any([corpus.positions[relation.positions] for relation in embedded.RELATIONS], axis=0)
    assert (clean.numpy() == corpus.tokens).all()
    assert (made.replaced[clean.numpy()[keep] != 2] == changed[keep][clean.numpy()[keep] != 2]).all()
    for rows, tokens in ((made.clean, clean), (made.masked, masked)):
        found = activations(loaded, tokens, [hook_point])[hook_point]
        torch.testing.assert_close(rows.x, found[torch.from_numpy(keep)])
        assert (rows.attributes["letter"] == corpus.attributes["letter"][keep]).all()
        assert set(rows.positions) == {relation.positions for relation in embedded.RELATIONS}


def test_rows_of_other_parents_and_rare_children_are_not_read(language):
    masked = planted_masking(language, lost="")
    rare = replace(language, fit=_without(language.fit, child=3))
    (pairs,) = replace(masked, language=rare).pairs
    assert 3 not in pairs.children.classes
    assert not (pairs.child == 3).any()
    assert (masked.clean.attributes["noun"] == 3).any()
    assert len(pairs.rows) == (np.isin(masked.clean.attributes["noun"], [-1, *pairs.children.classes])).sum()


def _without(rows: Rows, child: int) -> Rows:
    kept = rows.attributes["noun"] != child
    return Rows(
        x=rows.x[torch.from_numpy(kept)],
        attributes={name: values[kept] for name, values in rows.attributes.items()},
        positions={"noun": kept[kept], EVERYWHERE: kept[kept]},
        features=None if rows.features is None else rows.features[kept],
    )


def test_the_planted_world_is_what_these_tests_take_it_for(language):
    assert language.fit.x.shape == (N, D_MODEL)
    (known,) = language.parents
    assert len(known.classes) == N_PARENTS
