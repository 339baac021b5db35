"""What run.json says of a run when it starts."""

import dataclasses
import json
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_spec.layout import FLAG_BOS
from train.config import HOW_READ, DataConfig, RunConfig
from train.kernels._select import Kernel
from train.known import number_of
from train.loader import MixedBatchLoader
from train.run_folder import TRAINING
from train.scale import recipe_label

_BEFORE_THERE_WAS_A_CHOICE = {"config": {"precision": "fp32"}}  # what runs did whose run.json does not say


def run_facts(config: RunConfig, loader: MixedBatchLoader, kernel: Kernel) -> dict[str, Any]:
    """All of it, as JSON would give it back."""
    facts = {
        "name": config.name,
        "status": TRAINING,
        "recipe": recipe_label(config, loader.data),
        "config": dataclasses.asdict(config),
        "data": data_facts(loader.data),
        "cache": cache_facts(loader),
        "norm_factor": loader.scale.norm_factor,
        "target_norm_factor": loader.target_scale.norm_factor if loader.data.target_hook else None,
        "displacement": loader.scale.displacement,
        "kernel": kernel.name,
        "device": str(loader.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "git_commit": git_commit(),
        "n_steps": loader.n_steps,
        "tokens_seen": 0,
    }
    return json.loads(json.dumps(facts))


def data_facts(data: DataConfig) -> dict[str, Any]:
    """What decides the batches; how they are read is left out, for a resumed run may read another way."""
    return {name: value for name, value in dataclasses.asdict(data).items() if name not in HOW_READ}


def cache_facts(loader: MixedBatchLoader) -> dict[str, Any]:
    """Where the rows came from: enough to find them again and to name the SAE for other tools."""
    plan, hook = loader.cache.plan, loader.hook
    return {
        "path": loader.cache.place if loader.cache.files.is_remote else str(loader.cache.path.resolve()),
        "cache_id": plan.cache_id,
        "hook": hook.name,
        "hook_point": hook.hook_point,
        "tl_name": hook.tl_name,
        "hf_name": hook.hf_name,
        "target": _target_facts(loader),
        "model": plan.model.get("id", "unknown"),
        "dataset": plan.source.get("id", "unknown"),
        "window_tokens": plan.window_tokens,
        "variant": _variant_facts(loader),
        "prepend_bos": bool((loader.cache.column("flags", loader.shards[0]) & FLAG_BOS).any()),
    }


def _variant_facts(loader: MixedBatchLoader) -> dict[str, Any] | None:
    """How the text of the masked rows was made; None if the cache has no such variant."""
    named = [variant for variant in loader.cache.plan.variants if variant.name == loader.data.masked_variant]
    return dataclasses.asdict(named[0]) if named else None


def _target_facts(loader: MixedBatchLoader) -> dict[str, Any] | None:
    """The hook point that a transcoder reconstructs; None for an autoencoder."""
    if not loader.data.target_hook:
        return None
    hook = loader.cache.hook(loader.data.target_hook)
    return {"hook": hook.name, "hook_point": hook.hook_point, "tl_name": hook.tl_name, "hf_name": hook.hf_name}


def differing_facts(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What makes two runs of one name different runs: "lr (0.001, now 0.0003)" each."""
    differences = []
    for part in ("config", "data"):
        before, after = {**_BEFORE_THERE_WAS_A_CHOICE.get(part, {}), **(old.get(part) or {})}, new[part]
        differences += [
            f"{key} ({before.get(key)!s:.80}, now {after.get(key)})"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
    before = (old.get("cache") or {}).get("cache_id")
    if before != new["cache"]["cache_id"]:
        differences.append(f"cache ({before!s:.80}, now {new['cache']['cache_id']})")
    if old.get("name") != new["name"]:
        differences.append(f"name ({old.get('name')!s:.80}, now {new['name']})")
    for key in ("norm_factor", "target_norm_factor"):  # rows are divided by the new one, and the SAE folds in the old
        if not _is_near(old.get(key), new[key]):
            differences.append(f"{key} ({old.get(key)!s:.80}, now {new[key]})")
    return differences


def _is_near(before: object, now: float | None) -> bool:
    """Whether two factors are the same but for rounding, which a device does in its own way."""
    number = number_of(before)
    return before is now if number is None or now is None else math.isclose(number, now, rel_tol=1e-6)


def git_commit() -> str:
    """The commit of this checkout, "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
