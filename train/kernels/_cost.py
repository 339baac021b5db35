"""When a sparse step is the faster one."""

from train.engine import Job

MAX_DENSITY = {"cpu": 0.03, "cuda": 0.008}
"""Active latents as a share of d_sae, above which dense products win: measured on a CPU; for a GPU the ratio of its
product rate to its gather rate, counted and not measured (docs/performance.md)."""
MIN_PRODUCT = {"cpu": 2e8, "cuda": 1e10}
"""Multiplications of one dense product below which a step's many small operations cost more than they save."""


def saving(job: Job, device: str) -> tuple[bool, str]:
    """Whether a sparse step should be faster than a dense one, and why, for people."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    density = job.config.k / job.config.d_sae
    n_products = job.batch_size * job.config.d_sae * job.d_model
    found = f"k / d_sae = {density:.2%}"
    if density > max_density(device):
        return False, f"{found}, and above {max_density(device):.1%} dense products are faster"
    if n_products < MIN_PRODUCT[kind]:
        return False, "the step is so small that dense products are faster"
    return True, f"{found}: only the active latents are decoded and updated"


def max_density(device: str) -> float:
    """Share of latents that may be on for sparse sums to be the faster way."""
    return MAX_DENSITY["cuda" if device.startswith("cuda") else "cpu"]
