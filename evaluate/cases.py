"""Cases: the dictionaries to measure on one bench, each made when its turn comes, and what decides its numbers."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cache_spec import HookPlan, UserError
from evaluate.controls import (
    has_own_l0,
    kinds_of,
    mean_l0,
    oracle_subject,
    permuted_sae,
    same_starts,
    subject_of_sae,
    untrained_sae,
    with_any_threshold,
)
from evaluate.recipes import MATCHED, ORACLE, PERMUTED, RANDOM, Recipe
from evaluate.runs import Run
from evaluate.subject import Bench, Learned, Subject
from train.run_folder import CFG, FACTS, WEIGHTS, load_run
from train.sae import SparseAutoencoder

REPORT = "report.json"
MOST_PEERS = 4
_BROKEN = (RuntimeError, AssertionError, AttributeError, TypeError, IndexError)  # what a wrong cfg.json leads to


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One dictionary to measure.

    report: the file its numbers are kept in. facts: what decides them, beside bench, metrics and code. run: None for a
    control. with_example: also find the parent it absorbs most.
    """

    name: str
    recipe: Recipe
    seed: int
    make: Callable[[], Subject]
    report: Path
    facts: Mapping[str, Any]
    run: Run | None = None
    with_example: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """What the cases of one bench share. controls: the folder for the numbers of controls.

    seed: decides what metrics draw. with_peers: also read the decoders of other seeds.
    """

    bench: Bench
    name: str
    device: str
    seed: int
    controls: Path
    with_peers: bool

    def control(self, kind: str, arch: str, like: Run) -> Recipe:
        """The recipe of a control that stands beside the runs of a kind."""
        recipe = recipe_of(like, self.name)
        return replace(recipe, arch=arch, name=kind, kind=kind, is_plain=False, is_masked=False, control="")

    def kept(self, recipe: Recipe, seed: int) -> Path:
        """The file for the numbers of a control."""
        return self.controls / f"{safe_name(f'{recipe.kind} {recipe.arch} seed{seed}', str(recipe))}.json"


def safe_name(text: str, apart: str = "") -> str:
    """A file name for any text: its letters and digits, and a hash of it and of `apart`, so that none meet."""
    words = "_".join(re.findall(r"[A-Za-z0-9.-]+", text))[-80:].strip("._")
    return f"{words}-{hashlib.sha256(f'{text} {apart}'.encode()).hexdigest()[:8]}"


def recipe_of(run: Run, bench_name: str) -> Recipe:
    """What a run was trained with, as the tables name it."""
    return Recipe(
        bench=bench_name,
        arch=run.arch,
        k=run.k,
        d_sae=run.d_sae,
        name=run.recipe,
        is_plain=run.is_plain,
        is_masked=run.is_masked,
        control=run.control,
        settings=run.settings,
    )


def check_run(run: Run, hook: HookPlan) -> dict[str, str]:
    """Hashes of the files of a run; raises UserError, with the reason, if it is damaged or does not fit the cache."""
    try:
        sae = load_run(run.path).sae
        check_sae(sae, hook)
        if sae.d_sae != run.d_sae:
            raise UserError(f"{CFG} says {sae.d_sae} latents and {FACTS} {run.d_sae}; train the run again")
    except _BROKEN as error:
        raise UserError(f"{run.path.name} is damaged ({error}); move it away and train the run again") from error
    except OSError as error:
        raise UserError(f"{run.path.name} cannot be read ({error.strerror}); see to that and evaluate again") from error
    return {name: file_hash(run.path / name) for name in (WEIGHTS, CFG, FACTS)}


def check_sae(sae: SparseAutoencoder, hook: HookPlan) -> None:
    """Raises UserError if an SAE holds NaN or infinity or is of another width than the hook point."""
    if sae.d_model != hook.d_model or sae.is_transcoder:
        raise UserError(f"it reads {sae.d_model} dimensions and {hook.name} has {hook.d_model}; evaluate it elsewhere")
    for name, tensor in sae.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"its {name} holds NaN or infinity; train it again, with a lower --lr if it diverged")
    with torch.no_grad():
        sae(torch.zeros(1, sae.d_model))  # a k above d_sae fails here


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_cases(runs: Sequence[Run], hashes: Mapping[Path, Mapping[str, str]], place: Place) -> Iterator[Case]:
    """The runs, plain ones first within their kind. The first plain one of each architecture gets a worked example."""
    order = sorted(runs, key=lambda run: (run.kind, -run.d_sae, not run.is_plain, run.recipe, run.seed, run.name))
    examples = {run.arch: run for run in reversed(order) if run.is_plain}
    for run in order:
        peers = _peers(run, runs) if place.with_peers else []

        def trained(run: Run = run, peers: Sequence[Run] = tuple(peers)) -> Subject:
            decoders = tuple(_decoder(peer.path, place.device) for peer in peers)
            sae = load_run(run.path, place.device).sae
            return subject_of_sae(run.name, sae, run.k, place.bench, seed=place.seed, peers=decoders)

        yield Case(
            name=run.name,
            recipe=recipe_of(run, place.name),
            seed=run.seed,
            make=trained,
            report=run.path / REPORT,
            facts={
                "files": hashes[run.path],
                "peers": [[peer.name, hashes[peer.path][WEIGHTS]] for peer in peers],
                "with_example": run is examples.get(run.arch),
            },
            run=run,
            with_example=run is examples.get(run.arch),
        )


def _peers(run: Run, runs: Sequence[Run]) -> list[Run]:
    """Up to 4 runs of the same recipe and another seed, in order of their seeds."""
    of_recipe = [
        other
        for other in runs
        if (other.kind, other.recipe, other.d_sae) == (run.kind, run.recipe, run.d_sae) and other.seed != run.seed
    ]
    return sorted(of_recipe, key=lambda other: other.seed)[:MOST_PEERS]


def _decoder(folder: Path, device: str) -> Tensor:
    """The decoder [d_sae, d_model] of a run, without the rest of it."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return file.get_tensor("W_dec").float().to(device)


def control_cases(runs: Sequence[Run], hashes: Mapping[Path, Mapping[str, str]], place: Place) -> Iterator[Case]:
    """Untrained SAEs as they are and at matched L0, the plain runs with permuted decoders, and the oracle."""
    kinds = kinds_of(runs)
    for arch, group in same_starts(kinds):
        for run in group:
            peers = [other for other in group if other is not run] if place.with_peers else []
            own = () if has_own_l0(run) or run is not group[0] else (RANDOM,)  # once: it is compared with nothing
            for kind in (MATCHED, *own):
                if case := _untrained_case(kind, arch, run, peers, hashes, place):
                    yield case
    for group in kinds:
        for run in filter(lambda run: run.is_plain, group):
            yield _permuted_case(run, hashes, place)
    if place.bench.language is not None:
        recipe = Recipe(
            bench=place.name,
            arch="",
            k=0,
            d_sae=len(place.bench.language.feature_names),
            name=ORACLE,
            kind=ORACLE,
        )
        yield Case(
            name=ORACLE,
            recipe=recipe,
            seed=0,
            make=lambda: oracle_subject(place.bench, place.seed),
            report=place.kept(recipe, 0),
            facts={"oracle": len(place.bench.language.feature_names)},
        )


def _untrained_case(
    kind: str,
    arch: str,
    run: Run,
    peers: Sequence[Run],
    hashes: Mapping[Path, Mapping[str, str]],
    place: Place,
) -> Case | None:
    """What a run started from; without a k its L0 is matched to the trained run's, which then has to be a plain one."""
    needs_trained = kind == MATCHED and not run.k
    if needs_trained and not run.is_plain:
        return None

    def untrained() -> Subject:
        rows = place.bench.calibration
        sae, l0 = untrained_sae(run, rows), 0.0
        if kind == MATCHED:
            trained = Learned(sae=load_run(run.path, place.device).sae) if needs_trained else None
            sae, l0 = with_any_threshold(sae), mean_l0(trained, rows) if trained else run.k
        decoders = tuple(untrained_sae(peer, rows).W_dec for peer in peers)
        return subject_of_sae(kind, sae, l0, place.bench, seed=place.seed, peers=decoders)

    recipe = place.control(kind, arch, run)
    facts = {
        "start": [run.arch, run.k, run.d_sae, run.seed, run.norm_factor, run.init_b_dec],
        "peers": [peer.seed for peer in peers],
        "trained": hashes[run.path] if needs_trained else None,
    }
    name = f"{kind} {arch} seed{run.seed}"
    return Case(
        name=name, recipe=recipe, seed=run.seed, make=untrained, report=place.kept(recipe, run.seed), facts=facts
    )


def _permuted_case(run: Run, hashes: Mapping[Path, Mapping[str, str]], place: Place) -> Case:
    def permuted() -> Subject:
        sae = permuted_sae(load_run(run.path, place.device).sae, run.seed)
        return subject_of_sae(PERMUTED, sae, run.k, place.bench, seed=place.seed)

    recipe = place.control(PERMUTED, run.arch, run)
    return Case(
        name=f"{PERMUTED} {run.arch} seed{run.seed}",
        recipe=recipe,
        seed=run.seed,
        make=permuted,
        report=place.kept(recipe, run.seed),
        facts={"files": hashes[run.path]},
    )
