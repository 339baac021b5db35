"""What a harvest and a training take on many GPUs, on paper: operations, bytes and links, and what limits them.

Work that goes on at the same time is counted by its slowest part; planning comes before all of it. Two shares say how
much of the bare rates is kept: by the model's forward, and by a training step (of the floor in `benchmarks.model`).
"""

import math
from dataclasses import dataclass

from benchmarks.model import Rates, floor_seconds
from benchmarks.peers.job import Job, n_dead

ROW_COLUMNS = 20  # bytes of a row's columns in a cache of two variants
STATE_BYTES = 14  # of a parameter on its GPU: weight and two moments in fp32, and its copy in bf16
DENSE_BYTES, DENSE_CODES = 4, 4  # with the dense kernel also its gradient; and arrays [batch, d_sae] at one time
VALUE_BYTES = {"fp32": 4, "bf16": 2}  # of a pre-activation
BATCH_WIDE = ("batchtopk", "matryoshka")  # their k largest are those of the batch; topk has k in every row
CANDIDATES = 1.3  # for each of the k: what is exchanged so that a top-k over the whole batch is exact
PREFIXES = {"matryoshka": 5}  # reconstructions that are summed


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What there is to work with. Rates are bytes or operations in a second."""

    gpus: int
    gpus_per_node: int = 8
    rates: Rates
    """Of one GPU."""
    gpu_bytes: float
    model_share: float
    step_share: float
    dense_share: float
    """The same of the dense kernel."""
    disk: float
    """Of one node to where its caches are, written or read."""
    store: float
    """Of where the caches are, to all nodes together."""
    near: float
    """Of a GPU to those of its node."""
    far: float
    """Of a GPU to those of other nodes."""
    plan_rate: float
    """Tokens that the one process that plans reads and cuts."""
    price: float
    """Of a GPU for an hour."""

    @property
    def nodes(self) -> int:
        """Nodes that hold the GPUs."""
        return -(-self.gpus // self.gpus_per_node)


@dataclass(frozen=True, kw_only=True)
class Bill:
    """Seconds of each part that goes on at the same time, and of what comes before."""

    parts: dict[str, float]
    before: float = 0.0

    @property
    def limit(self) -> str:
        """What takes longest."""
        name = max(self.parts, key=lambda part: self.parts[part])
        return "planning" if self.before > self.parts[name] else name

    @property
    def seconds(self) -> float:
        """In all."""
        return self.before + max(self.parts.values())

    def price(self, machines: Machines) -> float:
        """Of all GPUs for the whole time, idle or not."""
        return self.seconds / 3600 * machines.gpus * machines.price


@dataclass(frozen=True, kw_only=True)
class Model:
    """A transformer as far as it is run."""

    d_model: int
    n_layers: int
    layer_parameters: int
    attention_width: int
    """Heads times their width."""
    window: int

    @property
    def operations(self) -> float:
        """Of one token: each weight once, and the products of attention with half a window on average."""
        products = 2.0 * self.layer_parameters
        attention = 4.0 * self.attention_width * self.window / 2
        return self.n_layers * (products + attention)


def transformer(d_model: int, n_layers: int, mlp: int, window: int, heads: int = 0, kv: int = 0, gated: bool = False):
    """A model by its widths; `heads` and `kv` are the widths of queries and of keys, d_model unless given."""
    heads, kv = heads or d_model, kv or d_model
    parameters = 2 * d_model * (heads + kv) + (3 if gated else 2) * d_model * mlp
    return Model(d_model=d_model, n_layers=n_layers, layer_parameters=parameters, attention_width=heads, window=window)


GEMMA_2_2B = transformer(
    2304, 13, 9216, 1024, heads=2048, kv=1024, gated=True
)  # up to layer 12, which is all that runs


def cache_bytes(d_model: int, n_tokens: float, n_variants: int) -> float:
    """Of one hook point in fp16."""
    return n_tokens * (2.0 * d_model * n_variants + ROW_COLUMNS)


def harvest_bill(model: Model, n_tokens: float, n_variants: int, machines: Machines) -> Bill:
    """Of a cache of one hook point: one process plans, then all make shards and write them beside the model."""
    written = cache_bytes(model.d_model, n_tokens, n_variants)
    operations = n_tokens * n_variants * model.operations
    return Bill(
        parts={
            "the model": operations / (machines.rates.operations * machines.model_share * machines.gpus),
            "a node's link to the disk": written / (machines.disk * machines.nodes),
            "the disk": written / machines.store,
        },
        before=n_tokens / machines.plan_rate,
    )


def sweep_bill(job: Job, n_saes: int, n_tokens: float, n_variants: int, kernel: str, machines: Machines) -> Bill:
    """Of SAEs spread over GPUs, each whole on one: every node reads the rows once, and the fullest GPU decides."""
    each = math.ceil(n_saes / machines.gpus)
    nodes = min(machines.nodes, -(-n_saes // machines.gpus_per_node))
    steps, read = n_tokens / job.batch, cache_bytes(job.d_model, n_tokens, n_variants)
    return Bill(
        parts={
            "training steps": each * steps * floor_seconds(job, kernel, machines.rates) / machines.step_share,
            "a node's link to the disk": read / machines.disk,
            "the disk": read * nodes / machines.store,
        }
    )


def wide_bill(job: Job, n_tokens: float, n_variants: int, kernel: str, machines: Machines) -> Bill:
    """Of one SAE whose latents are spread over all GPUs: steps and links take turns, rows are read meanwhile."""
    steps, read = n_tokens / job.batch, cache_bytes(job.d_model, n_tokens, n_variants)
    share = machines.dense_share if kernel == "dense" else machines.step_share
    here = floor_seconds(job, kernel, machines.rates) / share / machines.gpus
    between = link_seconds(job, machines)
    return Bill(
        parts={
            "training steps" if here >= between else "links between GPUs": steps * (here + between),
            "a node's link to the disk": read / machines.disk,
            "the disk": read * machines.nodes / machines.store,
        }
    )


def link_bytes(job: Job, gpus: int) -> float:
    """That a GPU gets from the others in a step: partial reconstructions summed in fp32, and candidates for the top.

    Of each row topk sends k from every GPU. AuxK sends a few more than its share of the d_model / 2 best of the dead
    (ten standard deviations of a Poisson count, a bit above what normal values need), and sums one more reconstruction.
    """
    others, values = (gpus - 1) / gpus, job.batch * VALUE_BYTES[job.precision]
    n_used, dead = job.d_model // 2, n_dead(job)
    n_bytes = 8.0 * others * job.batch * job.d_model * (PREFIXES.get(job.arch, 1) + (dead > 0))
    if job.arch in BATCH_WIDE:
        n_bytes += others * CANDIDATES * job.k * values
    elif job.arch == "topk":
        n_bytes += (gpus - 1) * job.k * values
    if dead > n_used:
        share = math.ceil(n_used / gpus)
        n_bytes += (gpus - 1) * min(n_used, share + 10 * math.sqrt(share)) * values
    return n_bytes


def link_seconds(job: Job, machines: Machines) -> float:
    """Of a step."""
    return link_bytes(job, machines.gpus) / (machines.near if machines.nodes == 1 else machines.far)


def state_bytes(job: Job, kernel: str, gpus: int) -> float:
    """On each of the GPUs that share one SAE: its parameters, moments and what else grows with its width."""
    parameters = 2.0 * job.d_model * job.d_sae
    column = DENSE_CODES * job.batch * VALUE_BYTES[job.precision]
    if kernel != "dense":
        return (STATE_BYTES * parameters + column * n_dead(job)) / gpus
    return ((STATE_BYTES + DENSE_BYTES) * parameters + column * (job.d_sae + n_dead(job))) / gpus
