"""Recipes and results made up for the tests of comparing."""

from dataclasses import replace
from typing import Any

from evaluate.columns import Column
from evaluate.recipes import Recipe, Result

SCORE = Column(meaning="a score", better="higher", oracle_is_best=True, short="sc", terminal=True)
COLUMNS = {"score": SCORE}


def recipe(name: str = "unmasked", **facts: Any) -> Recipe:
    plain = Recipe(bench="b", arch="batchtopk", k=6, d_sae=512, name=name, is_plain=name == "unmasked")
    return replace(plain, is_masked=name.startswith("masked"), **facts)


def results(of: Recipe, values: list[float], column: str = "score", first_seed: int = 0, **others: float):
    return [
        Result(run=f"{of.name}{i}", recipe=of, seed=first_seed + i, values={column: v, **others})
        for i, v in enumerate(values)
    ]
