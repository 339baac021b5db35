"""When a sparse step is the faster one."""

from train.engine import Job

MAX_DENSITY = {"cpu": 0.05, "cuda": 0.008}
"""Active latents as a share of d_sae, above which dense products win. For a CPU it was measured
(docs/performance.md): at 1 % sparse was faster at every shape, at 4 % as fast or faster, at 10 % at few. For a GPU it
is the ratio of its product rate to its gather rate, counted and not measured."""
MIN_GPU_PRODUCT = 1e10
"""Multiplications of one dense product below which, on a GPU, a step's many small operations should cost more than they
save: a guess. On a CPU no shape was found to be too small."""


def saving(job: Job, device: str) -> tuple[bool, str]:
    """Whether a sparse step should be faster than a dense one, and why, for people."""
    density = job.config.k / job.config.d_sae
    found = f"k / d_sae = {density:.2%}"
    if density > max_density(device):
        return False, f"{found}, and above {max_density(device):.1%} dense products are faster"
    if device.startswith("cuda") and job.batch_size * job.config.d_sae * job.d_model < MIN_GPU_PRODUCT:
        return False, "the step is so small that dense products are faster"
    return True, f"{found}: only the active latents are decoded and updated"


def max_density(device: str) -> float:
    """Share of latents that may be on for sparse sums to be the faster way."""
    return MAX_DENSITY["cuda" if device.startswith("cuda") else "cpu"]
