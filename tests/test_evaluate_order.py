"""Every metric ranks the oracle, a trained SAE and an untrained one in that order, on the embedded model.

Generic over the metrics: a column that is better higher or lower, and shipped as reliable, must keep the order.
"""

from collections.abc import Callable
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
from evaluate.names import Metric, available, find
from evaluate.runs import Run, find_runs
from evaluate.store import Store
from evaluate.subject import Bench, Subject
from evaluate.text_sources import TextSources
from harvest.__main__ import app as harvest
from train.__main__ import app as train
from train.run_folder import load_run

N_DOCUMENTS = {"fit": 700, "test": 700, "shifted": 400}
TOLERANCE = 1e-3  # the oracle's own numbers are estimated from text


def call(app, *arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    """Two seeds of batchtopk, 300 steps of 512 rows each, on a small cache of the embedded model."""
    folder = tmp_path_factory.mktemp("order")
    held = folder / "cache.zarr"
    call(harvest, "--model", "tiny", "--tokens", "60k", "--mask-prob", "0.3", "--out", held)
    options = ("--arch", "batchtopk", "--k", "6", "--d-sae", "512", "--masked-fraction", "0", "--seed", "0,1")
    options += ("--tokens", "154k", "--batch-size", "512", "--lr", "3e-3")
    call(train, "--cache", held, *options, "--out", folder / "runs")
    return find_runs(folder / "runs")[0]


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
def subjects(runs, bench) -> dict[str, list[Subject]]:
    """Trained SAEs, the same before their first step (both at L0 6), and the oracle."""
    made = {}
    for name, saes in (
        ("trained", [load_run(run.path).sae for run in runs]),
        ("untrained", [untrained_sae(run, bench.calibration) for run in runs]),
    ):
        decoders = [sae.W_dec.detach() for sae in saes]
        made[name] = [
            subject_of_sae(name, sae, 6, bench, peers=(*decoders[:i], *decoders[i + 1 :])) for i, sae in enumerate(saes)
        ]
    return {**made, "oracle": [oracle_subject(bench)]}


def measured(metric: Metric, subjects: list[Subject], bench: Bench) -> dict[str, float]:
    """Means over seeds of the ranked, reliable columns that every seed has."""
    if not all(getattr(bench, field) for field in metric.needs):
        return {}
    values = [metric.measure(subject) for subject in subjects]
    ranked = [name for name, column in metric.columns.items() if column.better and column.reliable]
    return {
        name: float(np.mean([numbers[name] for numbers in values]))
        for name in ranked
        if all(name in numbers for numbers in values)
    }


def better_by(column: Column, first: float, second: float) -> float:
    """By how much the first number is better than the second."""
    return first - second if column.better == "higher" else second - first


def order_broken(metric: Metric, values: dict[str, dict[str, float]]) -> list[str]:
    """A sentence for each column that does not keep the order."""
    broken = []
    for name, trained in values["trained"].items():
        column = metric.columns[name]
        oracle, untrained = values["oracle"].get(name), values["untrained"].get(name)
        if column.oracle_is_best and oracle is not None and better_by(column, oracle, trained) < -TOLERANCE:
            broken.append(f"{name}: the oracle has {oracle:.4f} and a trained SAE {trained:.4f}")
        if column.random_is_worst and untrained is not None and better_by(column, trained, untrained) <= 0:
            broken.append(f"{name}: a trained SAE has {trained:.4f} and an untrained one {untrained:.4f}")
    return broken


@pytest.fixture(scope="module")
def values_of(subjects, bench) -> Callable[[str], dict[str, dict[str, float]]]:
    """Name of a metric -> kind of subject -> column -> number, each measured once."""

    @cache
    def values(name: str) -> dict[str, dict[str, float]]:
        return {kind: measured(find(name), group, bench) for kind, group in subjects.items()}

    return values


@pytest.mark.parametrize("name", available())
def test_the_oracle_is_best_and_an_untrained_sae_worst(name, values_of):
    assert not order_broken(find(name), values_of(name))


@pytest.mark.parametrize("name", ["absorption", "core"])
def test_trained_saes_have_the_numbers_that_the_claims_are_about(name, values_of):
    claims = {column for column, facts in find(name).columns.items() if facts.claim}
    assert claims
    assert claims <= set(values_of(name)["trained"])


def test_an_untrained_sae_has_no_absorption_rather_than_little(values_of):
    names = values_of("absorption")["untrained"]
    assert names
    assert not [name for name in names if name.startswith("full_absorption")]
