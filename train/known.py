"""What a run.json must say to be believed: names, and the kind of value that each has."""

from collections.abc import Mapping
from typing import Any

from cache_spec.errors import UserError

_NUMBER = (int, float)
_PARTS = ("config", "data", "cache", "held_out", "failure", "versions", "calibration")
_TEXTS = ("name", "recipe", "kernel", "spread")
_WANTED: dict[str, tuple[type, ...]] = {
    **{f"config.{name}": (int,) for name in ("d_sae", "k", "seed")},
    **{f"data.{name}": (str,) for name in ("masked_variant", "positions", "target")},
    **{f"cache.{name}": (str,) for name in ("cache_id", "tl_name", "hf_name")},
    **{f"cache.{name}": (str, int, float) for name in ("model", "dataset", "window_tokens", "prepend_bos")},
    "config.arch": (str,),
    "config.masked_fraction": _NUMBER,
    "recipe": (str,),
    "name": (str,),
    "tokens_seen": (int,),
    "norm_factor": _NUMBER,
}
_OF_SOME: dict[str, dict[str, tuple[type, ...]]] = {  # parts of the cache's facts that may be missing or null
    "target": {f"cache.target.{name}": (str,) for name in ("tl_name", "hf_name")},
    "variant": {
        "cache.variant.mask_prob": _NUMBER,
        **{f"cache.variant.{name}": (str,) for name in ("kind", "mask_string")},
    },
}
AGAIN = "move its folder away and train the run again"


def check_parts(facts: Mapping[str, Any], where: object) -> None:
    """Raises UserError if a part of run.json that holds facts by name, or a text, is something else.

    Parts may be missing.
    """
    for names, kind, what in ((_PARTS, dict | None, "object"), (_TEXTS, str, "text")):
        for name in names:
            if name in facts and not isinstance(facts[name], kind):
                raise UserError(f"{where} says {name} is {facts[name]!r:.40}, which is no {what}; {AGAIN}")


def number_of(value: object) -> float | None:
    """The value if it is a number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def numbers_in(facts: Mapping[str, Any], part: str) -> dict[str, float]:
    """What a part of run.json says by name, as far as it is numbers; nothing if the part is not there."""
    return {name: number for name, value in (facts.get(part) or {}).items() if (number := number_of(value)) is not None}


def check_facts(facts: Mapping[str, Any], where: object) -> None:
    """Raises UserError unless all is there that the page of a pushed run tells, each of its kind."""
    check_parts(facts, where)
    wanted = dict(_WANTED)
    for part, kinds_of_part in _OF_SOME.items():
        if (facts.get("cache") or {}).get(part) is not None:
            wanted |= kinds_of_part
    for path, kinds in wanted.items():
        value: Any = facts
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kinds):
            raise UserError(f"{where} says {path} is {value!r:.40}, which cannot be; {AGAIN}")


def check_report(report: Mapping[str, Any], where: object) -> None:
    """Raises UserError if the metrics of a report.json are not numbers by name."""
    metrics = report.get("metrics", {})
    if not isinstance(metrics, dict) or not all(isinstance(numbers, dict) for numbers in metrics.values()):
        raise UserError(f"{where} has metrics that are no objects; evaluate the run again, or move the file away")
