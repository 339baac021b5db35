"""Every metric ranks the oracle, a trained SAE and an untrained one in that order, on the embedded model.

Generic over the metrics: a ranked column that is shipped as reliable keeps the order, or its exemption stands below.
topk is not here, for it fails: with k latents on every token an untrained one shows half of the two-token and of the
cross-token parents, so it has a full absorption there, and a better one than a trained one.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cache_spec import ActivationCache
from evaluate import generated_text
from evaluate.bench import NEEDS_MODEL, make_bench
from evaluate.columns import Column
from evaluate.controls import oracle_subject, subject_of_sae, untrained_sae
from evaluate.metrics.absorption import FAMILIES, MIN_SHARE
from evaluate.names import Measurements, Metric, available, find
from evaluate.runs import Run, find_runs
from evaluate.store import Store
from evaluate.subject import Bench, Subject
from evaluate.text_sources import TextSources
from harvest.__main__ import app as harvest
from train.__main__ import app as train
from train.run_folder import load_run

N_DOCUMENTS = {"fit": 700, "test": 700, "shifted": 400}
TOLERANCE = 1e-3  # the oracle's own numbers are estimated from text
N_MEASURED = {"batchtopk": 2, "jumprelu": 1}  # seeds, of the two trained; the other one is a peer

UNMEASURED = {"first_letter": "spelling"}  # it needs a model that spells
RANK_NOTHING = ("cooccurrence", "hedging", "robustness")  # shipped for what they describe
HELD = [name for name in available() if name not in (*UNMEASURED, *RANK_NOTHING)]

# Ranked columns that need not be worst for an untrained SAE, by the words of `meaning` that say why.
EXEMPT = {
    "a probe at chance cannot drop": ("ood_drop_1", "ood_drop_16", "ood_drop_128", "ood_drop_reconstruction"),
    "what it does not represent is not absorbed": (
        "mean_full_absorption_score",
        *(f"full_absorption_saebench_{family}" for family in FAMILIES),
    ),
    "even the oracle has some": (
        "mean_absorption_fraction_score",
        *(f"absorption_fraction_{family}" for family in FAMILIES),
    ),
    "An SAE that learnt too little to absorb scores well": (
        "first_letter_mean_full_absorption_score",
        "first_letter_mean_absorption_fraction_score",
    ),
    "the SAE has no latent for the letter, absorbed or not": ("first_letter_found_full_absorption_score",),
    "holds as much by chance": ("hedging",),
    "an SAE that ignores context moves little too": (
        "latent_shift",
        "latent_shift_l1",
        "latent_shift_cosine",
        "latent_shift_jaccard",
        "latent_shift_ratio",
    ),
    "an untrained topk SAE, with k latents on every token, has less": (
        "jaccard_mean",
        "jaccard_excess",
        "jaccard_lift",
        "jaccard_p99",
        "jaccard_p999",
        "jaccard_max_mean",
    ),
}

# Columns that an untrained SAE lacks, and the share of parents that is too small for them.
LACKING = {
    "recall_gap_cross_token": "represented_parents_cross_token",
    **{
        f"{rate}_{family}": f"represented_parents_{family}"
        for rate in ("full_absorption", "full_absorption_truth")
        for family in FAMILIES
    },
}

Values = dict[str, dict[str, float]]  # oracle, trained, untrained -> column -> mean over seeds


def call(app, *arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    """Two seeds of each architecture, 300 steps of 512 rows each, on a small cache of the embedded model."""
    folder = tmp_path_factory.mktemp("order")
    held = folder / "cache.zarr"
    call(harvest, "--model", "tiny", "--tokens", "60k", "--mask-prob", "0.3", "--out", held)
    options = ("--arch", ",".join(N_MEASURED), "--k", "6", "--d-sae", "512", "--masked-fraction", "0", "--seed", "0,1")
    options += ("--tokens", "154k", "--batch-size", "512", "--lr", "3e-3")
    call(train, "--cache", held, *options, "--out", folder / "runs")
    return sorted(find_runs(folder / "runs")[0], key=lambda run: (run.arch, run.seed))


@pytest.fixture(scope="module")
def bench(runs) -> Bench:
    opened = ActivationCache.open(Path(runs[0].cache_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated_text, "N_DOCUMENTS", N_DOCUMENTS)
        return make_bench(
            opened,
            opened.hook(runs[0].hook),
            device="cpu",
            seed=0,
            wanted=NEEDS_MODEL,
            store=Store(None),
            sources=TextSources(),
        )


@pytest.fixture(scope="module")
def subjects(runs, bench) -> dict[tuple[str, str], list[Subject]]:
    """(architecture, kind) -> trained SAEs, or the same before their first step, all at L0 6."""
    made = {}
    for arch, n_measured in N_MEASURED.items():
        own = [run for run in runs if run.arch == arch]
        for kind, saes in (
            ("trained", [load_run(run.path).sae for run in own]),
            ("untrained", [untrained_sae(run, bench.calibration) for run in own]),
        ):
            decoders = [sae.W_dec.detach() for sae in saes]
            made[arch, kind] = [
                subject_of_sae(kind, sae, 6, bench, peers=(*decoders[:i], *decoders[i + 1 :]))
                for i, sae in enumerate(saes[:n_measured])
            ]
    return made


@pytest.fixture(scope="module")
def values_of(subjects, bench) -> Callable[[str, str], Values]:
    """Name of a metric, architecture -> its numbers, each measured once."""
    oracle = [oracle_subject(bench)]

    @cache
    def measured_of(arch: str, kind: str) -> dict[str, dict[str, float]]:
        return measured(subjects[arch, kind] if arch else oracle)

    def values(name: str, arch: str) -> Values:
        trained, untrained = (measured_of(arch, kind)[name] for kind in ("trained", "untrained"))
        return {"oracle": measured_of("", "oracle")[name], "trained": trained, "untrained": untrained}

    return values


def held(metric: Metric) -> list[str]:
    """The columns of a metric that must keep some of the order."""
    return [
        name
        for name, column in metric.columns.items()
        if column.better and column.reliable and (column.random_is_worst or column.oracle_is_best)
    ]


def measured(subjects: list[Subject]) -> dict[str, dict[str, float]]:
    """Name of a metric -> means over seeds. All of one SAE, then of the next: probing and ood share its probes."""
    found = [{name: find(name).measure(subject) for name in HELD} for subject in subjects]
    return {name: means_of(find(name), [each[name] for each in found]) for name in HELD}


def means_of(metric: Metric, found: list[Measurements]) -> dict[str, float]:
    """Means over seeds of the held columns; a column is there for all seeds or for none."""
    means = {}
    for name in held(metric):
        numbers = [values[name] for values in found if name in values]
        assert len(numbers) in (0, len(found)), f"{name}: only {len(numbers)} of {len(found)} seeds have it"
        if numbers:
            means[name] = float(np.mean(numbers))
    return means


def is_better(column: Column, first: float, second: float, tolerance: float = 0.0) -> bool:
    """Whether the first number is better than the second, by more than the tolerance."""
    return (first - second if column.better == "higher" else second - first) > tolerance


def broken(name: str, column: Column, values: Values) -> str:
    """How a held column breaks the order, in a sentence; empty if it keeps it."""
    oracle, trained, untrained = (values[kind].get(name) for kind in ("oracle", "trained", "untrained"))
    if trained is None:
        return f"{name}: a trained SAE has no number"
    if column.oracle_is_best and (oracle is None or is_better(column, trained, oracle, TOLERANCE)):
        return f"{name}: the oracle has {oracle} and a trained SAE {trained}"
    if not column.random_is_worst:
        return ""
    if name in LACKING:
        few, enough = (values[kind][LACKING[name]] for kind in ("untrained", "trained"))
        return "" if untrained is None and few < MIN_SHARE <= enough else f"{name}: of {few} parents it is {untrained}"
    if untrained is None or not is_better(column, trained, untrained):
        return f"{name}: a trained SAE has {trained} and an untrained one {untrained}"
    return ""


@pytest.mark.parametrize("arch", N_MEASURED)
@pytest.mark.parametrize("name", HELD)
def test_the_oracle_is_best_and_an_untrained_sae_worst(name, arch, values_of):
    metric, values = find(name), values_of(name, arch)
    assert held(metric)
    assert not [fault for column in held(metric) if (fault := broken(column, metric.columns[column], values))]


@pytest.mark.parametrize("arch", N_MEASURED)
@pytest.mark.parametrize("name", HELD)
def test_a_column_whose_sign_is_turned_round_breaks_the_order(name, arch, values_of):
    metric, values = find(name), values_of(name, arch)
    for column in held(metric):
        facts = metric.columns[column]
        turned = replace(facts, better="lower" if facts.better == "higher" else "higher")
        if column not in LACKING or facts.oracle_is_best:  # else there is neither a bound nor an untrained number
            assert broken(column, turned, values), column


@pytest.mark.parametrize("name", RANK_NOTHING)
def test_metrics_that_rank_nothing_say_so_in_every_ranked_column(name):
    ranked = [column for column in find(name).columns.values() if column.better]
    assert ranked
    assert not any(column.reliable for column in ranked)


@pytest.mark.parametrize("name", UNMEASURED)
def test_the_embedded_model_lacks_what_an_unmeasured_metric_needs(name, bench):
    assert find(name).needs == (UNMEASURED[name],)
    assert getattr(bench, UNMEASURED[name]) is None


def test_every_ranked_column_is_held_to_the_order_or_exempt_with_a_reason():
    columns = {column: facts for name in available() for column, facts in find(name).columns.items() if facts.better}
    reasons = {column: reason for reason, names in EXEMPT.items() for column in names}
    assert set(reasons) == {name for name, facts in columns.items() if not (facts.reliable and facts.random_is_worst)}
    assert not [name for name, reason in reasons.items() if reason not in columns[name].meaning]
