"""Runs: the trained SAEs under a folder, and the cache each was trained on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache_spec import ActivationCache, CacheError, CacheNotFound, UserError
from cache_spec.copies import Copies
from cache_spec.remote import open_cache as open_anywhere
from cache_spec.untrusted import json_of, read_bounded, refuse_links
from evaluate.recipes import DROPOUT, NOISE, RANDOM_TOKEN, SMALL
from train.known import check_parts
from train.names import find
from train.recipe import Recipe
from train.run_folder import COMPLETE, FACTS, FAILED, failure_of, unsealed

UNFINISHED = "not finished; run the same python -m train with --resume"
TRANSCODER = "a transcoder, and the metrics compare an SAE with its own input"
_SAID = {  # fields that the recipe's label or another column says, or that make no other recipe
    "config": {
        *("name", "arch", "d_sae", "k", "seed", "masked_fraction", "masked_schedule", "consistency"),
        *("corrupt", "matched_fraction", "skip"),
    },
    "data": {"hook", "target_hook", "seed", "open_shards", "masked_variant", "positions", "target"},
}
_LENGTH = (("data", "n_tokens"), ("data", "batch_size"))
_SCHEDULE = (  # follows from the length of the training, unless it was given
    *("warmup_steps", "decay_start", "sparsity_warmup_steps", "anneal_start"),
    *("threshold_start", "threshold_beta", "dead_tokens"),
)
NO_CACHE = "its cache cannot be opened"
AGAIN = "train the run again, or move its folder away"


class RunsIncomplete(UserError):
    """There are runs that cannot be measured; the others, if any, were."""

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
    is_masked: bool  # trained on rows of a masked variant, without a corruption
    control: str  # a name of recipes.CONTROLS, or empty
    cache_path: str
    cache_id: str
    hook: str
    norm_factor: float  # trained on rows divided by this
    data_seed: int = 0  # decides the order of the rows
    init_b_dec: str = ""  # where b_dec started, if not as the architecture has it
    settings: str = ""  # what else differs between the runs of the folder, such as "lr 0.001"

    @property
    def kind(self) -> tuple[str, str, str, int, str]:
        """What runs that are compared have in common."""
        return self.cache_id, self.hook, self.arch, self.k, self.settings


def find_runs(folder: Path) -> tuple[list[Run], dict[str, str]]:
    """The SAEs in `folder` (itself a run, or with runs below it), and why each of the others is left out, by name.

    Raises UserError if there is nothing, RunsIncomplete (exit code 1) if nothing can be measured.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder that python -m train wrote with --out")
    files = sorted([*folder.glob(FACTS), *folder.glob(f"*/{FACTS}")])
    if not files:
        raise UserError(f"{folder} holds no run (a folder with {FACTS}); give the --out of python -m train")
    complete: list[tuple[Run, dict[str, Any]]] = []
    left_out: dict[str, str] = {}
    for file in files:
        try:
            if file.parent != folder and file.parent.is_symlink():
                raise UserError("a link, and a report would be written to where it leads; put the run itself there")
            facts = _read(file)
            if why := _why_left_out(facts):
                left_out[file.parent.name] = why
            else:
                complete.append((_run(file, facts), facts))
        except UserError as error:
            left_out[file.parent.name] = str(error)
    if not complete:
        raise RunsIncomplete(f"none of the {len(left_out)} runs in {folder} can be measured; {reasons(left_out)}")
    varying = _varying([facts for _, facts in complete])
    runs = [
        replace(run, settings=", ".join(filter(None, (_setting(facts, key) for key in varying))))
        for run, facts in complete
    ]
    return _with_small(runs), left_out


def one_run(folder: Path) -> Run:
    """The run in a folder, a transcoder too. Raises UserError if there is none, or it is not finished."""
    file = folder / FACTS
    if not file.is_file():
        raise UserError(
            f"{folder} is not a run: it has no {FACTS}; give one folder of those that python -m train wrote"
        )
    facts = _read(file)
    if (why := _why_left_out(facts)) and why != TRANSCODER:
        raise RunsIncomplete(f"{folder}: {why}")
    return _run(file, facts)


def _with_small(runs: Sequence[Run]) -> list[Run]:
    """Plain runs of a smaller dictionary than the largest plain one of their kind are controls."""
    largest: dict[tuple, int] = {}
    for run in runs:
        if run.is_plain:
            largest[run.kind] = max(run.d_sae, largest.get(run.kind, 0))
    return [replace(run, control=SMALL) if run.is_plain and run.d_sae < largest[run.kind] else run for run in runs]


def without_twins(runs: Iterable[Run], left_out: dict[str, str]) -> list[Run]:
    """The runs whose recipe and seed no earlier one has: a copy would pass for a second seed.

    Give those that can be read, or a damaged copy puts the good run out.
    """
    first: dict[tuple, Run] = {}
    for run in runs:
        twin = first.setdefault((*run.kind, run.recipe, run.d_sae, run.seed), run)
        if twin is not run:
            left_out[run.path.name] = (
                f"of the same recipe and seed as {twin.path.name}, and would pass for another seed; "
                "move it to another folder"
            )
    return list(first.values())


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


def _varying(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The parts and names of what differs between runs, of all that decides what was trained."""
    keys = dict.fromkeys(
        (part, name) for part in _SAID for facts in runs for name in facts.get(part, {}) if name not in _SAID[part]
    )
    varying = []
    for key in keys:
        found: dict[tuple[str, ...], set[str]] = {}
        for facts in runs:
            alike = tuple(_setting(facts, other) for other in _LENGTH) if key[1] in _SCHEDULE else ()
            found.setdefault(alike, set()).add(_setting(facts, key))
        if any(len(values) > 1 for values in found.values()):
            varying.append(key)
    return varying


def _setting(facts: dict[str, Any], key: tuple[str, str]) -> str:
    """One fact of a run in words: "lr 0.001", or for penalties "l1=0.02"; empty if there is none."""
    value = facts.get(key[0], {}).get(key[1])
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value in (None, "") else f"{key[1].replace('n_tokens', 'tokens')} {value}"


def _read(file: Path) -> dict[str, Any]:
    try:
        data = read_bounded(file)
        refuse_links(file.parent, "a run's folder has none: put the file itself there")
        facts = json_of(data, finite=True)
        if isinstance(facts, dict):
            check_parts(facts, FACTS)
    except CacheError as error:
        raise UserError(str(error)) from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{FACTS} is not JSON ({error}); {AGAIN}") from error
    except OSError as error:
        raise UserError(f"{FACTS} cannot be read ({error.strerror}); see to that, or move its folder away") from error
    if not isinstance(facts, dict):
        raise UserError(f"{FACTS} is not a JSON object; {AGAIN}")
    return unsealed(facts, file)


def _run(file: Path, facts: dict[str, Any]) -> Run:
    try:
        config, data, cache = facts["config"], facts.get("data", {}), facts["cache"]
        positions, variant = data.get("positions", "all"), str(data.get("masked_variant", "masked"))
        recipe = str(facts["recipe"])
        d_sae = _whole("d_sae", config["d_sae"], least=1)
        if config["masked_fraction"] and positions != "all":
            recipe += f", {positions}"
        run = Run(
            path=file.parent,
            name=str(facts["name"]),
            recipe=recipe,
            arch=str(config["arch"]),
            k=_whole("k", config["k"], most=d_sae),
            d_sae=d_sae,
            seed=_whole("seed", config["seed"]),
            is_plain=not config["masked_fraction"] and not config["corrupt"],
            is_masked=bool(config["masked_fraction"]) and not config["corrupt"] and variant.startswith("masked"),
            control=_control(str(config["corrupt"]), variant if config["masked_fraction"] else ""),
            cache_path=str(cache["path"]),
            cache_id=str(cache["cache_id"]),
            hook=str(cache["hook"]),
            norm_factor=_positive("norm_factor", facts["norm_factor"]),
            data_seed=_whole("seed", data.get("seed", 0)),
            init_b_dec=str(config.get("init_b_dec") or ""),
        )
    except UserError:
        raise  # it says what is wrong
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{FACTS} lacks or garbles {error}; {AGAIN}") from error
    try:
        architecture(run)
    except UserError as error:
        raise UserError(f"{FACTS} says what nothing was trained with: {error}; {AGAIN}") from error
    return run


def architecture(run: Run) -> Recipe:
    """The architecture of a run, by its name. Raises UserError if there is none of that name, size and k."""
    recipe: Recipe = getattr(find("architectures", run.arch), run.arch)(run.d_sae, run.k)
    if recipe.uses_k and not run.k:
        raise UserError(f"its architecture is {run.arch}, which has a k of 1 or more, and its k is 0")
    return recipe


def _whole(name: str, value: object, *, least: int = 0, most: int | None = None) -> int:
    """A count or seed of run.json. Raises UserError for anything else."""
    if type(value) is int and value >= least and (most is None or value <= most):
        return value
    wanted = f"of {least} or more" if most is None else f"from {least} to {most}"
    raise UserError(f"{FACTS} says {name} is {value!r}, and a whole number {wanted} is wanted; {AGAIN}")


def _positive(name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300:
        return float(value)
    raise UserError(f"{FACTS} says {name} is {value!r}, and a finite number above 0 is wanted; {AGAIN}")


def _control(corrupt: str, variant: str) -> str:
    """What a run is a control for, by its corruption or the variant that replaces clean rows; empty if nothing."""
    corruption = corrupt.partition("=")[0]
    if corruption:
        return DROPOUT if corruption == "dropout" else NOISE
    return RANDOM_TOKEN if variant.startswith("random") else ""


def open_caches(
    runs: Sequence[Run], given: str | Path | None, left_out: dict[str, str], copies: Copies | None = None
) -> dict[str, ActivationCache]:
    """cache_id -> its cache, opened; runs whose cache cannot be had are named in `left_out`.

    Raises UserError if nothing can be had at the place given.
    """
    found: dict[str, ActivationCache] = {}
    for run in runs:
        if run.cache_id in found:
            continue
        try:
            found[run.cache_id] = open_cache(run, given, copies)
        except UserError as error:
            if given is not None and not isinstance(error, CacheError):
                raise  # no run said this, but --cache
            left_out[run.path.name] = str(error) if isinstance(error, CacheError) else f"{NO_CACHE}: {error}"
        except OSError as error:
            if given is not None:
                raise
            left_out[run.path.name] = f"{NO_CACHE}: {error.strerror}; say where it is with --cache"
    for run in runs:
        if run.cache_id in found:
            left_out.pop(run.path.name, None)  # another run of this cache says where it is now
    return found


def open_cache(run: Run, given: str | Path | None, copies: Copies | None = None) -> ActivationCache:
    """The cache a run was trained on, at `given` or where its run.json says, a folder or a URL.

    Raises CacheNotFound if it is not there and CacheError if it is another one.
    """
    place = given or run.cache_path
    try:
        cache = open_anywhere(place, copies, allow_partial=True)
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
