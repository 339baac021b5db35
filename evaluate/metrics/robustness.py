"""robustness: how far the latents of a token move when other tokens of its context are masked."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from evaluate.columns import Column
from evaluate.rows import Rows
from evaluate.subject import Subject, chunks

NEEDS = ("masked",)
WANTS = ()
_CAUTION = "; an SAE that ignores context moves little too, so may an untrained one (gated): it ranks nothing"
COLUMNS = {
    "latent_shift": Column(
        meaning="context masked, own token kept: |f - f~| / |f| of the latents, mean over tokens" + _CAUTION,
        better="lower",
        random_is_worst=False,
        reliable=False,
        short="latent shift",
    ),
    "latent_shift_l1": Column(
        meaning="the same with sums of absolute values" + _CAUTION,
        better="lower",
        random_is_worst=False,
        reliable=False,
    ),
    "latent_shift_cosine": Column(
        meaning="cosine of a token's latents with and without its context masked" + _CAUTION,
        better="higher",
        random_is_worst=False,
        reliable=False,
    ),
    "latent_shift_jaccard": Column(
        meaning="latents on both with and without context masked / on in either, mean over tokens" + _CAUTION,
        better="higher",
        random_is_worst=False,
        reliable=False,
    ),
    "latent_shift_lost": Column(meaning="share of a token's latents that masking its context turns off"),
    "latent_shift_gained": Column(meaning="latents that masking its context turns on, per latent that was on"),
    "activation_shift": Column(meaning="|x - x~| / |x| of the activations themselves: what the model does"),
    "reconstruction_shift": Column(meaning="the same of the reconstructions"),
    "latent_shift_ratio": Column(
        meaning="latent shift / activation shift; above 1 the dictionary amplifies the change" + _CAUTION,
        better="lower",
        random_is_worst=False,
        reliable=False,
    ),
    "latent_shift_rows": Column(meaning="share of those tokens that have a latent on: the means are over them"),
}


def robustness(subject: Subject) -> dict[str, float]:
    """Masking at inference as a stress test of any dictionary: clean rows x beside x~, the same token, context masked.

    Rows whose own token was replaced are left out, and those without a latent on in clean text, since f = f(x) divides.
    Means over rows of |f - f~| / |f| (L2, and L1), the cosine of f and f~, and with S, S~ the sets of latents that are
    on: |S & S~| / |S | S~|, lost |S \\ S~| / |S|, gained |S~ \\ S| / |S|. Likewise |x - x~| / |x| and, with the offset,
    |y - y~| / |y| of the reconstructions. latent_shift_ratio divides the two means.
    The oracle reads labels of other text and is not measured.
    """
    bench = subject.bench
    assert bench.masked is not None
    assert bench.replaced is not None
    if subject.held_out is not bench.clean:
        return {}
    parts = [_per_row(subject, clean, masked) for clean, masked in _kept(bench.clean, bench.masked, bench.replaced)]
    per_row = torch.cat(parts, dim=1) if parts else torch.zeros(len(_PER_ROW), 0)
    if not per_row.shape[1]:
        return {}
    values = dict(zip(_PER_ROW, per_row.mean(1).tolist(), strict=True))
    values["latent_shift_rows"] = per_row.shape[1] / int((~np.asarray(bench.replaced)).sum())
    if values["activation_shift"] > 0:
        values["latent_shift_ratio"] = values["latent_shift"] / values["activation_shift"]
    return values


_PER_ROW = tuple(name for name in COLUMNS if name not in ("latent_shift_ratio", "latent_shift_rows"))


def _kept(clean: Rows, masked: Rows, replaced: np.ndarray) -> Iterator[tuple[Rows, Rows]]:
    """Aligned chunks of the rows whose own token was kept."""
    kept = torch.from_numpy(~np.asarray(replaced)).to(clean.x.device)
    yield from zip(chunks(Rows(x=clean.x[kept])), chunks(Rows(x=masked.x[kept])), strict=True)


def _per_row(subject: Subject, clean: Rows, masked: Rows) -> Tensor:
    """The quantities of _PER_ROW, [n_quantities, n] float64, of the rows with a latent on."""
    f, moved = subject.dictionary.encode(clean), subject.dictionary.encode(masked)
    some = (f != 0).any(1)
    f, moved = f[some], moved[some]
    on, on_moved = f != 0, moved != 0
    n_on, n_both = on.sum(1).double(), (on & on_moved).sum(1).double()
    n_moved = on_moved.sum(1).double()
    y, y_moved = subject.dictionary.decode(f), subject.dictionary.decode(moved)
    found = {
        "latent_shift": _shift(f, moved, 2),
        "latent_shift_l1": _shift(f, moved, 1),
        "latent_shift_cosine": torch.nn.functional.cosine_similarity(f, moved, dim=1).double(),
        "latent_shift_jaccard": n_both / (n_on + n_moved - n_both),
        "latent_shift_lost": (n_on - n_both) / n_on,
        "latent_shift_gained": (n_moved - n_both) / n_on,
        "activation_shift": _shift(clean.x[some], masked.x[some], 2),
        "reconstruction_shift": _shift(y, y_moved, 2),
    }
    return torch.stack([found[name] for name in _PER_ROW])


def _shift(before: Tensor, after: Tensor, order: int) -> Tensor:
    """|before - after| / |before| of every row, [n, d] twice -> [n]."""
    size = torch.linalg.vector_norm(before, order, dim=1).clamp(min=1e-12)
    return (torch.linalg.vector_norm(before - after, order, dim=1) / size).double()
