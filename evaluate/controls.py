"""Controls that stand in the same table: SAEs that never trained, a shuffled decoder, an oracle with the answers."""

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from cache_spec.seeds import derive_seed
from evaluate.oracle import fit_oracle
from evaluate.rows import Rows
from evaluate.runs import Run, architecture
from evaluate.subject import Bench, Dictionary, Learned, Subject, chunks, matched_threshold
from train.activations import RUNNING, TopK
from train.sae import SparseAutoencoder, geometric_median
from train.saelens import fold
from train.step import new_sae

MEDIAN_ROWS = 4096
MOST_SEEDS = 2  # of each kind of control: they are far from what is trained


def subject_of_sae(
    name: str, sae: SparseAutoencoder, l0: float, bench: Bench, *, seed: int = 0, peers: tuple[Tensor, ...] = ()
) -> Subject:
    """An SAE under test: with its own threshold, and with the threshold that makes its clean L0 equal `l0`.

    Where there is no threshold (topk), or l0 is 0 (an L1 penalty decides the sparsity), it is tested as it is.
    """
    raw = Learned(sae=sae)
    matched = raw
    if sae.threshold is not None and l0 > 0:
        matched = Learned(sae=sae.with_threshold(matched_threshold(sae, bench.calibration, l0)))
    return Subject(name=name, dictionary=matched, raw=raw, bench=bench, held_out=bench.clean, seed=seed, peers=peers)


def oracle_subject(bench: Bench, seed: int = 0) -> Subject:
    """The perfect dictionary of the labelled text, scored on that text: the cache's rows have no labels."""
    assert bench.language is not None
    oracle = fit_oracle(bench.language.even)
    return Subject(name="oracle", dictionary=oracle, raw=oracle, bench=bench, held_out=bench.language.test, seed=seed)


@torch.no_grad()
def untrained_sae(run: Run, calibration: Rows) -> SparseAutoencoder:
    """The SAE that `run` started from, as it would have been saved: before its first step, in units of raw rows."""
    recipe = architecture(run)
    x = calibration.x[:MEDIAN_ROWS] / run.norm_factor
    sae = new_sae(recipe, x.shape[1], run.d_sae, run.seed).to(x.device)
    start = run.init_b_dec or recipe.init_b_dec
    if start != "zero":
        sae.b_dec.copy_(geometric_median(x) if start == "median" else x.mean(0))
    tensors = {{"b_gate": "b_enc"}.get(name, name): tensor for name, tensor in fold(sae, run.norm_factor).items()}
    if sae.activation.threshold == RUNNING:
        sae.threshold = torch.empty(run.d_sae, device=x.device)  # one for each latent, as folding gives it
    sae.load_state_dict(tensors)
    return sae.eval().requires_grad_(False)


def start_of(run: Run) -> tuple[object, ...]:
    """What decides the SAE that a run started from, beside its size and seed: equal for equal starts.

    BatchTopK and matryoshka differ in what they are trained for alone. Architectures without k are matched to what
    their own trained SAEs have, so they are never the same.
    """
    recipe = architecture(run)
    activation = repr(recipe.activation) if isinstance(recipe.activation, TopK) else recipe.activation.threshold
    own = (run.d_sae, run.k, run.settings, run.norm_factor, run.init_b_dec or recipe.init_b_dec)
    entries = (recipe.init_entries, recipe.init_norm, recipe.init_threshold)
    return (activation, recipe.gated, recipe.subtract_b_dec, *entries, *own, "" if run.k else run.arch)


def has_own_l0(run: Run) -> bool:
    """Whether an untrained SAE of this kind has L0 = k as it is (topk), so that there is nothing to match."""
    return isinstance(architecture(run).activation, TopK)


def with_any_threshold(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same SAE with a threshold that can be moved: 0 where it had none."""
    return sae.with_threshold(0.0) if sae.threshold is None and not isinstance(sae.activation, TopK) else sae


@torch.no_grad()
def permuted_sae(sae: SparseAutoencoder, seed: int) -> SparseAutoencoder:
    """The same encoder with decoder rows in another order, in which no row stays: one random cycle."""
    order = np.random.default_rng(derive_seed("evaluate/permuted", seed)).permutation(sae.d_sae)
    source = np.empty_like(order)
    source[order] = np.roll(order, 1)
    other = copy.deepcopy(sae)
    other.W_dec.copy_(sae.W_dec[torch.from_numpy(source).to(sae.W_dec.device)])
    return other


def mean_l0(dictionary: Dictionary, rows: Rows) -> float:
    """Latents that are on per row."""
    return sum(int((dictionary.encode(part) != 0).sum()) for part in chunks(rows)) / rows.n


def kinds_of(runs: Iterable[Run]) -> list[list[Run]]:
    """For each kind (architecture, k and settings) up to 2 runs of its largest dictionary, of different seeds.

    Plain ones where there are such, in order of their seeds: what controls stand beside.
    """
    kinds: dict[tuple, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.kind, -run.d_sae, run.seed, not run.is_plain, run.name)):
        chosen = kinds.setdefault(run.kind, [])
        fits = not chosen or (run.d_sae == chosen[0].d_sae and run.seed not in {other.seed for other in chosen})
        if fits and len(chosen) < MOST_SEEDS:
            chosen.append(run)
    return list(kinds.values())


def same_starts(kinds: Sequence[list[Run]]) -> list[tuple[str, list[Run]]]:
    """Architectures whose untrained SAEs are the same, named together ("batchtopk, matryoshka"), with their runs."""
    groups: dict[tuple, list[list[Run]]] = {}
    for runs in kinds:
        groups.setdefault((start_of(runs[0]), tuple(run.seed for run in runs)), []).append(runs)
    return [(", ".join(sorted(runs[0].arch for runs in group)), group[0]) for group in groups.values()]
