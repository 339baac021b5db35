"""absorption: how often a parent's own latent stays silent because a child's latent has taken over its direction."""

import numpy as np

from evaluate.absorbed import ParentRates, latents_of_parents, rates_of, tokens_of_parent
from evaluate.columns import Column
from evaluate.language import Parents
from evaluate.leakage import leakage
from evaluate.subject import Subject

FAMILIES = ("same_token", "two_token", "cross_token")
WITHOUT_CHILD = ("cross_token",)  # families whose parent also occurs without a child: a topic before its hero is named
MIN_SHARE = 0.5  # of the parents, or of the children, that a dictionary must have for a rate over them to be given
_FLATTERED = "an untrained SAE scores well, for what it does not represent is not absorbed"
_UNBOUNDED = "even the oracle has some, for a child's own direction may point along its parent's"
_REPRESENTED = "of parents that the dictionary represents, where these are half of all"


def _columns() -> dict[str, Column]:
    columns = {
        "mean_full_absorption_score": Column(
            meaning=f"SAEBench's full absorption over all parents, mean over families; {_FLATTERED}",
            better="lower",
            oracle_is_best=True,
            random_is_worst=False,
            reliable=False,
        ),
        "mean_absorption_fraction_score": Column(
            meaning=f"SAEBench's absorption fraction over all parents, mean over families; {_UNBOUNDED}",
            better="lower",
            random_is_worst=False,
            reliable=False,
        ),
        "mean_num_split_features": Column(meaning="latents that stand for one parent, mean over parents"),
    }
    for family in FAMILIES:
        columns |= _family_columns(family, family.replace("_", " "))
    return columns


def _family_columns(family: str, words: str) -> dict[str, Column]:
    short = family.split("_")[0]
    columns = {
        "full_absorption": Column(
            meaning=f"{words}: the parent's latents are all off and one aligned latent carries at least 40 % of it, "
            f"{_REPRESENTED}",
            better="lower",
            claim=True,
            oracle_is_best=True,
            parts=f"full_absorption_saebench_{family}",
            counted=f"represented_parents_{family}",
            short=f"abs {short}",
            terminal=True,
        ),
        "full_absorption_saebench": Column(
            meaning=f"{words}: the same of all parents, the same for every SAE; {_FLATTERED}",
            better="lower",
            oracle_is_best=True,
            random_is_worst=False,
            reliable=False,
        ),
        "absorption_fraction": Column(
            meaning=f"{words}: share of the parent's direction carried by up to three other latents, {_REPRESENTED}; "
            f"{_UNBOUNDED}",
            better="lower",
            reliable=False,
        ),
        "represented_parents": Column(
            meaning=f"{words}: parents shown, by own latents or absorbed, on half of their tokens, as a share of all",
            better="higher",
            oracle_is_best=True,
        ),
        "silent": Column(
            meaning=f"{words}: the parent's latents are all off although it is there: the size of the recall hole",
            better="lower",
            oracle_is_best=True,
        ),
        "main_latent_f1": Column(
            meaning=f"{words}: F1 of a probe on a parent's latents, fit text, mean over parents",
            better="higher",
            oracle_is_best=True,
        ),
    }
    if family in WITHOUT_CHILD:
        columns["recall_gap"] = Column(
            meaning=f"{words}: P(parent's latents off | parent with a child) - P(off | parent without one), "
            f"{_REPRESENTED}; it may be below 0",
            better="lower",
            short=f"gap {short}",
        )
    return {f"{name}_{family}": column for name, column in {**columns, **_truth_columns(words, short)}.items()}


def _truth_columns(words: str, short: str) -> dict[str, Column]:
    return {
        "full_absorption_truth": Column(
            meaning=f"{words}: the parent's best latent is off and its child's best latent is on, of children that "
            "have a latent (F1 at least 0.3), where these are half of all, and so are the represented parents",
            better="lower",
            claim=True,
            oracle_is_best=True,
            short=f"lost {short}",
        ),
        "n_children_with_latent": Column(
            meaning=f"{words}: children that have a latent (F1 at least 0.3)", better="higher", oracle_is_best=True
        ),
        "leak_dec": Column(
            meaning=f"{words}: how much of the parent the decoder rows of its children's latents hold, as a share of "
            "how much they hold of the child; 0 is none, below 0 they take it away",
        ),
        "leak_enc": Column(
            meaning=f"{words}: how far a child's direction alone lowers its parent's latent, as a share of the value "
            "it usually has; below 0 it raises it. Without a bar, for it depends on what else the latent stands for",
        ),
    }


NEEDS = ("language",)
WANTS = ()
COLUMNS = _columns()


def absorption(subject: Subject) -> dict[str, float]:
    """Absorption of every parent of every relation, against ground truth, per family.

    The parent's direction is a dense class-balanced logistic probe; its latents are `latent_choice.main_latents`. On
    test tokens where parent and child are on and the dense probe is right, `projection.absorbed` says what is silent
    and what is absorbed. Rates are means over tokens of a child, then over children, then over parents.

    SAEBench's score is over all parents. A dictionary without a latent for a parent has nothing to absorb, and so an
    untrained one scores better than a trained one. The headline therefore leaves out a parent that the dictionary does
    not represent: one that is neither shown by its main latents nor absorbed on half of its tokens. (A bar on F1 would
    not do: absorption lowers F1, and it would drop the parents that are absorbed most.) Where fewer than half of the
    parents are left, there is no number rather than a good one. So two SAEs have means over different
    parents, and one that loses a parent altogether looks better for it: differences are therefore taken over the
    parents that both represent, parent by parent (`full_absorption_saebench@letter b`), and represented_parents says
    how many there are.

    recall_gap per parent is the mean over children of P(silent) minus P(silent) where the parent is on without a child,
    in the families where it occurs so: of the embedded language's, cross_token alone.
    main_latent_f1 is the mean over parents of the F1, on fit text, of a logistic probe on their main latents.
    full_absorption_truth, leak_dec, leak_enc: `leakage.leakage`; the first two only beside a headline, and where half
    of the children have a latent. A decoder with its rows in another order hides absorption from all but
    full_absorption_truth and silent, so these are read beside the explained variance.
    """
    language = subject.bench.language
    assert language is not None
    values: dict[str, float] = {}
    scores: dict[str, list[float]] = {"full_absorption": [], "absorption_fraction": []}
    n_main: list[int] = []
    for parents in language.parents:
        main, f1 = latents_of_parents(subject, parents)
        n_main += [len(latents) for latents in main]
        rates = _rates(subject, parents, main)
        for quantity, all_parents in scores.items():
            all_parents.append(float(np.mean([getattr(rate, quantity) for rate in rates.values()])))
        measured = {"main_latent_f1": float(f1.mean()), **_summary(rates, parents.relation.family)}
        measured |= _leaks(subject, parents, represented="full_absorption" in measured)
        for name, value in measured.items():
            quantity, at, part = name.partition("@")
            values[f"{quantity}_{parents.relation.family}{at}{part}"] = value
    if n_main:
        values |= {f"mean_{quantity}_score": float(np.mean(rates)) for quantity, rates in scores.items()}
        values["mean_num_split_features"] = float(np.mean(n_main))
    return values


def _rates(subject: Subject, parents: Parents, main: list[np.ndarray]) -> dict[str, ParentRates]:
    """The rates of every parent that occurs with a child, by the parent's name."""
    language = subject.bench.language
    assert language is not None
    names = language.value_names[parents.relation.parent]
    found = {
        f"{parents.relation.parent} {names[value]}": rates_of(tokens_of_parent(subject, parents, i, latents))
        for i, (value, latents) in enumerate(zip(parents.classes, main, strict=True))
    }
    return {name: rates for name, rates in found.items() if rates is not None}


def _summary(rates: dict[str, ParentRates], family: str) -> dict[str, float]:
    """Columns, without the family's name, of the rates of its parents."""
    represented = [rate for rate in rates.values() if rate.represented]
    values = {
        "full_absorption_saebench": float(np.mean([rate.full_absorption for rate in rates.values()])),
        **{f"full_absorption_saebench@{name}": rate.full_absorption for name, rate in rates.items()},
        "silent": float(np.mean([rate.silent for rate in rates.values()])),
        "represented_parents": len(represented) / len(rates),
        **{f"represented_parents@{name}": float(rate.represented) for name, rate in rates.items()},
    }
    if len(represented) >= MIN_SHARE * len(rates):
        values["full_absorption"] = float(np.mean([rate.full_absorption for rate in represented]))
        values["absorption_fraction"] = float(np.mean([rate.absorption_fraction for rate in represented]))
        gaps = [rate.recall_gap for rate in represented if rate.recall_gap is not None]
        if gaps and family in WITHOUT_CHILD:
            values["recall_gap"] = float(np.mean(gaps))
    return values


def _leaks(subject: Subject, parents: Parents, *, represented: bool) -> dict[str, float]:
    """Columns, without the family's name, of what the latents of children do to their parents', if there are any."""
    leaks = leakage(subject, parents)
    values = {"n_children_with_latent": float(leaks.n_with_latent)}
    if represented and leaks.n_with_latent >= max(1, MIN_SHARE * leaks.n_children):
        values |= {"full_absorption_truth": leaks.full_absorption, "leak_dec": leaks.decoder}
    if leaks.encoder is not None:
        values["leak_enc"] = leaks.encoder
    return values
