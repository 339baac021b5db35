"""The two configurations: what the batches are (once a sweep) and what one SAE is (once a run). Facts only."""

from dataclasses import dataclass

POSITIONS = ("all", "drop_masked", "only_masked")
TARGETS = ("self", "clean")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What all runs of a sweep share: the rows, their order, and what is to be reconstructed."""

    hook: str
    """Group of the hook point in the cache, such as layer_12."""
    n_tokens: int
    """Rows to train on; a cache with fewer is read several times."""
    batch_size: int = 2048
    masked_variant: str = "masked"
    """The variant that masked rows are taken from."""
    positions: str = "all"
    """Rows to use: all, drop_masked (never one whose own token was replaced), only_masked (only those)."""
    target: str = "self"
    """What to reconstruct: self (the input as it is, masked or noisy) or clean (the clean row)."""
    seed: int = 0
    """Decides the order of the rows and which rows of a batch are masked, for all runs alike."""
    open_shards: int = 0
    """Shards read at the same time; 0 means enough of them to mix well."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One SAE of a sweep."""

    name: str
    arch: str
    d_sae: int
    k: int = 0
    """Active latents a row (the wanted mean for jumprelu); 0 where the architecture has none."""
    seed: int = 0
    """Decides the initial weights and the noise of a corruption."""
    masked_fraction: float = 0.0
    """Exact share of rows taken from the masked variant."""
    corrupt: str = ""
    """A control, such as gaussian=0.3."""
    matched_fraction: float = 0.0
    """The masked fraction whose displacement the corruption was matched to; 0 if it was given outright."""
    penalties: tuple[str, ...] = ()
    """Coefficients that differ from the architecture's own, such as l1=0.02."""
    lr: float = 3e-4
    warmup_steps: int
    """The learning rate rises linearly from 0 over these steps."""
    decay_start: int
    """From this step the learning rate falls linearly to 0 at the end."""
    sparsity_warmup_steps: int
    """The L1 and L0 penalties rise linearly from 0 over these steps."""
    threshold_start: int
    """After this step the running threshold of BatchTopK is kept."""
    threshold_beta: float
    """How much of the running threshold each step keeps."""
    dead_tokens: int
    """A latent that was silent for so many tokens counts as dead."""
