"""Controls that stand in the same table: an SAE that never trained, and an oracle that knows the answers."""

import torch

from evaluate.oracle import fit_oracle
from evaluate.rows import Rows
from evaluate.runs import Run
from evaluate.subject import Bench, Learned, Subject, matched_threshold
from train import names
from train.recipe import Recipe
from train.sae import SparseAutoencoder, geometric_median
from train.step import new_sae

MEDIAN_ROWS = 4096


def untrained_sae(run: Run, calibration: Rows) -> SparseAutoencoder:
    """The SAE that `run` started from: same architecture, size and seed, before its first step."""
    recipe: Recipe = getattr(names.find("architectures", run.arch), run.arch)(run.d_sae, run.k)
    x = calibration.x
    sae = new_sae(recipe, x.shape[1], run.d_sae, run.seed).to(x.device)
    if recipe.init_b_dec == "median":
        with torch.no_grad():
            sae.b_dec.copy_(geometric_median(x[:MEDIAN_ROWS]))
    return sae


def subject_of_sae(name: str, sae: SparseAutoencoder, k: int, bench: Bench) -> Subject:
    """An SAE under test: with its own threshold, and with the threshold that makes its clean L0 equal k.

    Where there is no threshold (topk) or no k (an L1 penalty decides the sparsity), it is tested as it is.
    """
    raw = Learned(sae=sae)
    matched = raw
    if sae.threshold is not None and k > 0:
        matched = Learned(sae=sae.with_threshold(matched_threshold(sae, bench.calibration, k)))
    return Subject(name=name, dictionary=matched, raw=raw, bench=bench, held_out=bench.clean)


def oracle_subject(bench: Bench) -> Subject:
    """The perfect dictionary of the labelled text, scored on that text: the cache's rows have no labels."""
    assert bench.language is not None
    oracle = fit_oracle(bench.language.even)
    return Subject(name="oracle", dictionary=oracle, raw=oracle, bench=bench, held_out=bench.language.test)
