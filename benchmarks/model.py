"""What a training step must cost: floating-point operations and bytes, and the time that they take at given rates.

A floor, not a forecast: it counts each operand of a pass over memory once and nothing that could be fused away. A step
at 60 % of it is close to what the machine can do.
"""

from dataclasses import dataclass

from benchmarks.peers.job import Job, n_dead

H200 = (790e12, 4.3e12)  # bf16 products and memory, as measured by others on one H200
ADAM_BYTES = 24  # of a parameter: it and two moments in fp32, each read and written
GRADIENT_BYTES = 8  # of a parameter whose gradient exists in memory: written once, read once
SHADOW_BYTES = 2  # of a parameter: the copy in bf16 that the next product reads
N_GATHERS = 4  # decoding, gradients of the codes, of W_dec and of W_enc each touch k rows of d_model


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second."""

    operations: float
    """Floating-point, in products of the precision at hand."""
    bytes: float
    """Read and written."""


@dataclass(frozen=True)
class Part:
    """One item of a step's bill."""

    name: str
    operations: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        """The operations at full speed and the bytes at full speed, one after the other."""
        return self.operations / rates.operations + self.bytes / rates.bytes


def bill(job: Job, kernel: str) -> list[Part]:
    """What one step of a kernel costs at least. `dense` pays five products, `sparse` and `triton` one and gathers."""
    width = {"fp32": 4, "bf16": 2}[job.precision]
    n_parameters = 2 * job.d_model * job.d_sae
    shadow = SHADOW_BYTES if job.precision == "bf16" else 0
    product = 2.0 * job.batch * job.d_model * job.d_sae
    codes = job.batch * job.d_sae * width
    dead = Part("AuxK: four products with the dead", 8.0 * job.batch * job.d_model * n_dead(job), 0)
    if kernel == "dense":
        return [
            Part("five products", 5 * product, 0),
            # pre-activations, codes and the gradients of both
            Part("codes written and read", 0, 4 * 2 * codes),
            dead,
            Part("Adam and the gradients", 0, (ADAM_BYTES + GRADIENT_BYTES + shadow) * n_parameters),
        ]
    active = job.batch * job.k * job.d_model
    selection = Part("pre-activations written and read", 0, 0 if kernel == "triton" else 2 * codes)
    return [
        Part("encoder's product", product, 0),
        selection,
        Part("gathers", 2.0 * N_GATHERS * active, N_GATHERS * active * width),
        dead,
        Part("Adam", 0, (ADAM_BYTES + shadow) * n_parameters),
    ]


def floor_seconds(job: Job, kernel: str, rates: Rates) -> float:
    """The least time of a step at these rates."""
    return sum(part.seconds(rates) for part in bill(job, kernel))


def bill_in_words(job: Job, kernel: str, rates: Rates) -> str:
    """`sparse: encoder's product 17.2 GFLOP 46.1 ms, ...`"""
    words = []
    for part in bill(job, kernel):
        if part.operations or part.bytes:
            amounts = [f"{part.operations / 1e9:,.1f} GFLOP"] * bool(part.operations)
            amounts += [f"{part.bytes / 1e6:,.0f} MB"] * bool(part.bytes)
            words.append(f"{part.name} {', '.join(amounts)} = {1e3 * part.seconds(rates):.2f} ms")
    return f"{kernel}: {'; '.join(words)}"
