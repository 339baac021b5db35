"""Runs: the trained SAEs under a folder, and the cache each was trained on."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache_spec import ActivationCache, CacheError, CacheNotFound, UserError

RUN_FILE = "run.json"
_SETTINGS = (("config", "penalties"), ("config", "lr"), ("data", "n_tokens"), ("data", "batch_size"))


class RunsIncomplete(UserError):
    """There are runs, and none of them is finished."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run: the facts that its run.json states."""

    path: Path
    name: str
    recipe: str
    arch: str
    k: int
    d_sae: int
    seed: int
    is_plain: bool  # trained on clean rows only, without a corruption
    is_masked: bool
    cache_path: str
    cache_id: str
    hook: str
    settings: str = ""  # what else differs between the runs of the folder, such as "lr 0.001"


def find_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """The complete runs in `folder` (itself a run, or with runs below it) and the names of the unfinished ones.

    Raises UserError if there is nothing, RunsIncomplete (exit code 1) if nothing is complete.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder that python -m train wrote with --out")
    files = sorted([*folder.glob(RUN_FILE), *folder.glob(f"*/{RUN_FILE}")])
    if not files:
        raise UserError(f"{folder} holds no run (a folder with {RUN_FILE}); give the --out of python -m train")
    complete: list[tuple[Run, dict[str, Any]]] = []
    unfinished: list[str] = []
    for file in files:
        facts = _read(file)
        if facts.get("status") == "complete":
            complete.append((_run(file, facts), facts))
        else:
            unfinished.append(file.parent.name)
    if not complete:
        raise RunsIncomplete(
            f"none of the {len(unfinished)} runs in {folder} is finished; run the same python -m train with --resume"
        )
    varying = [key for key in _SETTINGS if len({_setting(facts, key) for _, facts in complete}) > 1]
    runs = [
        replace(run, settings=", ".join(filter(None, (_setting(facts, key) for key in varying))))
        for run, facts in complete
    ]
    return runs, unfinished


def _setting(facts: dict[str, Any], key: tuple[str, str]) -> str:
    """One fact of a run in words: "lr 0.001", or for penalties "l1=0.02"; empty if there is none."""
    value = facts.get(key[0], {}).get(key[1])
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else f"{key[1].replace('n_tokens', 'tokens')} {value}"


def _read(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON ({error}); train the run again, or move its folder away") from error
    if not isinstance(facts, dict):
        raise UserError(f"{file} is not a JSON object; train the run again, or move its folder away")
    return facts


def _run(file: Path, facts: dict[str, Any]) -> Run:
    try:
        config, cache = facts["config"], facts["cache"]
        positions = facts.get("data", {}).get("positions", "all")
        recipe = str(facts["recipe"])
        if config["masked_fraction"] and positions != "all":
            recipe += f", {positions}"
        return Run(
            path=file.parent,
            name=str(facts["name"]),
            recipe=recipe,
            arch=str(config["arch"]),
            k=int(config["k"]),
            d_sae=int(config["d_sae"]),
            seed=int(config["seed"]),
            is_plain=not config["masked_fraction"] and not config["corrupt"],
            is_masked=bool(config["masked_fraction"]) and not config["corrupt"],
            cache_path=str(cache["path"]),
            cache_id=str(cache["cache_id"]),
            hook=str(cache["hook"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} lacks or garbles {error}; train the run again, or move its folder away") from error


def open_cache(run: Run, given: Path | None) -> ActivationCache:
    """The cache a run was trained on, at `given` or where its run.json says.

    Raises CacheNotFound if it is not there and CacheError if it is another one.
    """
    place = given or Path(run.cache_path)
    try:
        cache = ActivationCache.open(place, allow_partial=True)
    except CacheNotFound as error:
        if given is not None:
            raise
        raise CacheNotFound(
            f"run {run.name} was trained on {run.cache_path}, and no cache is there now; say where it is with --cache"
        ) from error
    if cache.plan.cache_id != run.cache_id:
        raise CacheError(
            f"{place} is cache {cache.plan.cache_id}, and run {run.name} was trained on {run.cache_id}; "
            "say where that one is with --cache, or harvest it again"
        )
    return cache
