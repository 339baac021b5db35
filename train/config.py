"""The two configurations: what the batches are (once a sweep) and what one SAE is (once a run). Facts only."""

from dataclasses import dataclass

POSITIONS = ("all", "drop_masked", "only_masked")
TARGETS = ("self", "clean")
PRECISIONS = ("fp32", "bf16")
HOW_READ = ("io", "readers", "read_ahead")  # fields of DataConfig that change no result


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
    target_hook: str = ""
    """Hook point to reconstruct, for a transcoder; empty means the input's own."""
    io: str = "auto"
    """How files are read: mmap, pread, or auto by their size and place."""
    readers: int = 2
    """Threads that read ahead."""
    read_ahead: int = 4
    """Batches read in advance."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One SAE of a sweep. What is empty or None here is as the architecture has it."""

    name: str
    arch: str
    d_sae: int
    k: int = 0
    """Active latents a row (the wanted mean for jumprelu); 0 where the architecture has none."""
    seed: int = 0
    """Decides the initial weights, the noise of a corruption and what resampling draws."""
    masked_fraction: float = 0.0
    """Exact share of rows taken from the masked variant."""
    masked_schedule: str = "constant"
    """How the share gets there: constant, or linear=N, which rises from 0 over the first N steps."""
    consistency: float = 0.0
    """Weight of the squared distance between the codes of the clean and the masked view of a row."""
    corrupt: str = ""
    """A control, such as gaussian=0.3."""
    matched_fraction: float = 0.0
    """The masked fraction whose displacement the corruption was matched to; 0 if it was given outright."""
    penalties: tuple[str, ...] = ()
    """Coefficients that differ from the architecture's own, such as l1=0.02."""
    skip: bool = False
    """A transcoder gets a linear path from input to output beside the latents (Paulo et al. 2025)."""
    precision: str = "fp32"
    """Of matrix products: fp32, or bf16 with weights, moments and losses in float32."""
    lr: float = 3e-4
    beta1: float | None = None
    """Adam's first moment keeps this much each step."""
    clip_norm: float | None = None
    """Gradients longer than this are shortened to it; 0 lets them be."""
    decoder: str = ""
    """unit (decoder rows keep length 1) or free."""
    init_b_dec: str = ""
    """Where b_dec starts: zero, or the median or mean of the first batch."""
    aux_k: int = 0
    """Dead latents that AuxK uses a row; 0 is half of d_model."""
    bandwidth: float = 0.001
    """Width of the window around a jumprelu threshold in which it learns."""
    resample_every: int = 0
    """Steps between two rounds in which dead latents are started again from badly explained rows; 0 is never."""
    warmup_steps: int
    """The learning rate rises linearly from 0 over these steps."""
    decay_start: int
    """From this step the learning rate falls linearly to 0 at the end."""
    sparsity_warmup_steps: int
    """The L1 and L0 penalties rise linearly from 0 over these steps."""
    anneal_start: int = 10_000
    """p_anneal lowers p from this step on."""
    p_end: float | None = None
    """p_anneal lowers p from 1 to this."""
    p_updates: int = 10
    """In so many moves, spread evenly from anneal_start to the last step."""
    p_queue: int = 10
    """Steps before a move whose penalties decide how much the coefficient is rescaled."""
    threshold_start: int
    """After this step the running threshold of BatchTopK is kept."""
    threshold_beta: float
    """How much of the running threshold each step keeps."""
    calibrate: bool = True
    """At the end the running threshold is replaced by the one whose L0 on clean rows is k."""
    dead_tokens: int
    """A latent that was silent for so many tokens counts as dead."""
