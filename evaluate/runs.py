"""Runs: the trained SAEs under a folder, and the cache each was trained on."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache_spec import ActivationCache, CacheError, CacheNotFound, UserError
from train.run_folder import COMPLETE, FAILED, failure_of

RUN_FILE = "run.json"
UNFINISHED = "not finished; run the same python -m train with --resume"
TRANSCODER = "a transcoder, and the metrics compare an SAE with its own input"
_SETTINGS = (
    *(("config", name) for name in ("penalties", "lr", "resample_every", "decoder", "clip_norm", "calibrate")),
    *(("data", name) for name in ("n_tokens", "batch_size")),
)


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


def find_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """The SAEs in `folder` (itself a run, or with runs below it), and why each of the others is left out, by name.

    Raises UserError if there is nothing, RunsIncomplete (exit code 1) if nothing can be measured.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder that python -m train wrote with --out")
    files = sorted([*folder.glob(RUN_FILE), *folder.glob(f"*/{RUN_FILE}")])
    if not files:
        raise UserError(f"{folder} holds no run (a folder with {RUN_FILE}); give the --out of python -m train")
    complete: list[tuple[Run, dict[str, Any]]] = []
    left_out: dict[str, str] = {}
    for file in files:
        facts = _read(file)
        if why := _why_left_out(facts):
            left_out[file.parent.name] = why
        else:
            complete.append((_run(file, facts), facts))
    if not complete:
        raise RunsIncomplete(f"none of the {len(left_out)} runs in {folder} can be measured; {reasons(left_out)}")
    varying = [key for key in _SETTINGS if len({_setting(facts, key) for _, facts in complete}) > 1]
    runs = [
        replace(run, settings=", ".join(filter(None, (_setting(facts, key) for key in varying))))
        for run, facts in complete
    ]
    return runs, left_out


def _why_left_out(facts: dict[str, Any]) -> str:
    """Why a run cannot be measured; empty if it can."""
    if facts.get("status") == FAILED:
        return f"{failure_of(facts)}; train it with a lower --lr into another folder"
    if facts.get("status") != COMPLETE:
        return UNFINISHED
    data = facts.get("data")
    return TRANSCODER if isinstance(data, dict) and data.get("target_hook") else ""


def reasons(left_out: dict[str, str]) -> str:
    """Every reason once, with the runs that it concerns."""
    names: dict[str, list[str]] = {}
    for name, why in left_out.items():
        names.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(those)}: {why}" for why, those in names.items())


def _setting(facts: dict[str, Any], key: tuple[str, str]) -> str:
    """One fact of a run in words: "lr 0.001", or for penalties "l1=0.02"; empty if there is none."""
    value = facts.get(key[0], {}).get(key[1])
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value in (None, "") else f"{key[1].replace('n_tokens', 'tokens')} {value}"


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
