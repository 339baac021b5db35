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
    gated: bool = False
    """The activation says which latents are on, a second path how much comes through."""
    uses_k: bool = True
    subtract_b_dec: bool = True
    decoder: str = "unit"
    """unit: decoder rows keep length 1. free: they may grow, and sparsity penalties weigh codes by their length."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0
    init_entries: str = "uniform"
    init_norm: float = 1.0
    init_threshold: float = 0.0
    init_b_dec: str = "median"
    """Where b_dec starts: zero, or the geometric median or the mean of the first batch."""
    p_end: float | None = None
    """The power of penalty lp falls from 1 to this; None where it is no matter."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What a kernel gives for one batch."""

    f: Tensor
    """Codes [batch, d_sae]."""
    reconstructions: list[Tensor]
    """[batch, d_out] for each prefix."""
    smallest: Tensor | None
    """The smallest active code, a scalar, where a running threshold wants it."""
    gate: Tensor | None = None
    """What a gated SAE's activation made of the gate's pre-activations [batch, d_sae]; None for others."""


@dataclass(frozen=True, kw_only=True)
class StepView:
    """What a penalty gets to see of one step. A penalty is a function of it that returns a scalar.

    Where an SAE is spread over processes (`sae.spread`), codes and `dead` are those of this process's latents, and rows
    are its rows. A penalty is then a mean over these rows: what sums over latents takes `spread.latents.total`, and
    what is no sum over rows takes `spread.rows.mean` of each mean that it is made of.
    """

    sae: SparseAutoencoder
    x: Tensor
    target: Tensor
    forward: Forward
    dead: Tensor | None
    """Numbers of the dead latents [n_dead], None if there are none."""
    sparsity_scale: float
    """Rises from 0 to 1 while sparsity is warmed up."""
    k: int
    decoder: str = "unit"
    """The recipe's."""
    aux_k: int = 0
    """Dead latents that AuxK may use a row; 0 is half of d_out."""
    p: float = 1.0
    """The power of penalty lp at this step."""
    p_rescale: Tensor | float = 1.0
    """What keeps lp's size the same while p falls."""
