"""The choice of a kernel: made once, aloud."""

from cache_spec.errors import UserError
from train.engine import Job, Kernel
from train.kernels._cost import saving
from train.names import available, find

AUTO = "auto"


def select(name: str, device: str, job: Job | None = None) -> Kernel:
    """The kernel of that name; with "auto" the one that should be the fastest for the job on the device.

    Raises UserError for an unknown name, and for a kernel that cannot train the job: a kernel that is named is that
    one or an error. Without a job nothing is known of the shape, and "auto" is dense.
    """
    if name == AUTO:
        name, why = _fastest(device, job) if job is not None else ("dense", "the shape is not known")
        return Kernel(name, find("kernels", name).engine, why)
    module = find("kernels", name)
    if problem := module.unavailable(device):
        raise UserError(f"--kernel {name} {problem}; take another, or auto")
    if job is not None and (problem := module.refusal(job)):
        raise UserError(f"--kernel {name} cannot train {job.config.name or job.config.arch}: {problem}; take auto")
    return Kernel(name, module.engine)


def _fastest(device: str, job: Job) -> tuple[str, str]:
    """Name and reason."""
    reasons = []
    for name in (name for name in ("triton", "sparse") if name in available("kernels")):
        module = find("kernels", name)
        if name == "triton" and not device.startswith("cuda"):
            continue  # where it can run at all there, it is by Triton's interpreter, for tests
        if problem := module.unavailable(device):
            reasons.append(f"{name} {problem}")
            continue
        if problem := module.refusal(job):
            reasons.append(f"{name} cannot: {problem}")
            continue
        if name == "sparse" and device.startswith("cuda") and job.config.precision == "bf16":
            reasons.append("sparse takes 1.6 to 3.8 times as long as dense in bf16 on a GPU")  # docs/performance.md
            continue
        worth, words = saving(job, device)
        if worth:
            return name, words
        reasons.append(words)
        break
    return "dense", "; ".join(reasons)
