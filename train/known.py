"""What a run.json must say to be believed: names, and the kind of value that each has."""

from collections.abc import Mapping
from typing import Any

from cache_spec.errors import UserError

_NUMBER = (int, float)
_PARTS = ("config", "data", "cache", "held_out", "failure", "versions", "calibration")
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
    """Raises UserError if a part of run.json that holds facts by name is something else. Parts may be missing."""
    for name in _PARTS:
        if not isinstance(facts.get(name), dict | None):
            raise UserError(f"{where} says {name} is {facts[name]!r:.40}, which is no object; {AGAIN}")


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
