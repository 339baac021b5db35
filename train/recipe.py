"""What an architecture file returns, and what a penalty gets to see."""

from dataclasses import dataclass

from torch import Tensor

from train.activations import Activation
from train.sae import SparseAutoencoder


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Activation, penalties and prefixes, and the few settings of the optimiser that differ between them."""

    activation: Activation
    prefixes: tuple[int, ...]
    """Numbers of latents that must each reconstruct alone; one for a plain SAE."""
    penalties: tuple[tuple[str, float], ...]
    """Names of files in penalties/ and their coefficients."""
    uses_k: bool = True
    subtract_b_dec: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0
    init_entries: str = "uniform"
    init_norm: float = 1.0
    init_threshold: float = 0.0
    b_dec_from_data: bool = True
    """Start b_dec at the geometric median of the first batch, not at zero."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What a kernel gives for one batch."""

    f: Tensor
    """Codes [batch, d_sae]."""
    reconstructions: list[Tensor]
    """[batch, d_model] for each prefix."""
    smallest: Tensor | None
    """The smallest active code, a scalar, where a running threshold wants it."""


@dataclass(frozen=True, kw_only=True)
class StepView:
    """What a penalty gets to see of one step. A penalty is a function of it that returns a scalar."""

    sae: SparseAutoencoder
    x: Tensor
    target: Tensor
    forward: Forward
    dead: Tensor | None
    """Numbers of the dead latents [n_dead], None if there are none."""
    sparsity_scale: float
    """Rises from 0 to 1 while sparsity is warmed up."""
    k: int
