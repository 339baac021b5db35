"""A run's folder: a SAELens v6 SAE (cfg.json, sae_weights.safetensors), run.json, log.jsonl; state/ until it is whole.

The saved SAE takes raw activations: the norm factor is folded into biases and thresholds. run.json says
"complete" last of all, so a run that says so is whole.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cache_spec.errors import UserError
from cache_spec.files import PARTIAL, readable_json, write_file
from train.activations import Activation, ReLU, Threshold, TopK
from train.sae import SparseAutoencoder

CFG, WEIGHTS, FACTS, LOG, STATE = "cfg.json", "sae_weights.safetensors", "run.json", "log.jsonl", "state"
SAELENS_VERSION = "6.54.12"  # the format we write; from 6.0.0 on SAELens reads it as it is
TRAINING, COMPLETE = "training", "complete"
_THEIR_NAMES = {"matryoshka": "matryoshka_batchtopk"}  # our architecture -> SAELens's, where they differ


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A finished run: the SAE in use (raw activations in, reconstruction out) and what run.json says."""

    path: Path
    sae: SparseAutoencoder
    facts: dict[str, Any]


@torch.no_grad()
def fold(sae: SparseAutoencoder, norm_factor: float) -> dict[str, Tensor]:
    """The tensors of an SAE that does on x what `sae` does on x / norm_factor, with codes norm_factor times larger.

    Thresholds are in the units of the codes, so they grow with them; decoder rows keep their length of 1.
    """
    tensors = {
        "W_enc": sae.W_enc,
        "b_enc": sae.b_enc * norm_factor,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec * norm_factor,
    }
    if sae.threshold is not None:
        tensors["threshold"] = (sae.threshold * norm_factor).expand(sae.d_sae)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def saelens_config(sae: SparseAutoencoder, facts: dict[str, Any]) -> dict[str, Any]:
    """cfg.json as SAELens 6 reads it; our own facts stand under metadata.granary."""
    config, cache = facts["config"], facts["cache"]
    arch = _THEIR_NAMES.get(config["arch"], config["arch"])
    k = sae.activation.k if isinstance(sae.activation, TopK) else None
    metadata = {
        "sae_lens_version": SAELENS_VERSION,
        "model_name": cache["model"],
        "hook_name": cache["tl_name"],
        "hf_hook_name": cache["hf_name"],
        "dataset_path": cache["dataset"],
        "context_size": cache["window_tokens"],
        "prepend_bos": cache["prepend_bos"],
        "training_architecture": arch,
        "training_architecture_details": {"matryoshka_widths": list(sae.prefixes)} if len(sae.prefixes) > 1 else {},
        "granary": {"name": facts["name"], "config": config, "data": facts["data"], "cache_id": cache["cache_id"]},
    }
    kept = "standard" if sae.threshold is None else "jumprelu"
    return {
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"k": k, "rescale_acts_by_decoder_norm": False} if k else {}),
        "metadata": metadata,
        "architecture": "topk" if k else kept,
    }


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write run.json in one step."""
    write_file(folder / FACTS, readable_json(facts))


def finish_run(folder: Path, sae: SparseAutoencoder, facts: dict[str, Any]) -> None:
    """Write the SAE, and then run.json with the status "complete"."""
    write_file(folder / WEIGHTS, save(fold(sae, facts["norm_factor"])))
    write_file(folder / CFG, readable_json(saelens_config(sae, facts)))
    write_facts(folder, {**facts, "status": COMPLETE})


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What run.json says; None if there is none. Raises UserError if it is mangled."""
    try:
        facts = json.loads((folder / FACTS).read_text())
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / FACTS} is not JSON ({error}); move {folder} away and train it again") from None
    if not isinstance(facts, dict):
        raise UserError(f"{folder / FACTS} is not a JSON object; move {folder} away and train it again")
    if "status" not in facts:
        raise UserError(f"{folder / FACTS} has no status; move {folder} away and train it again")
    return facts


def load_run(path: str | Path, device: str = "cpu") -> TrainedRun:
    """The finished run in a folder. Raises UserError if there is none, it is unfinished, or a file is damaged."""
    folder = Path(path)
    facts = read_facts(folder)
    if facts is None:
        raise UserError(f"{folder} is not a run: it has no {FACTS}; give a folder that `python -m train` wrote")
    if facts.get("status") != COMPLETE:
        raise UserError(f"{folder} is not finished; run the same `python -m train` command with --resume")
    try:
        config = json.loads((folder / CFG).read_text())
        tensors = load((folder / WEIGHTS).read_bytes())
        sae = _assemble(config, tensors)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} is damaged ({error}); move it away and train the run again") from None
    return TrainedRun(path=folder, sae=sae.to(device).eval().requires_grad_(False), facts=facts)


def _assemble(config: dict[str, Any], tensors: dict[str, Tensor]) -> SparseAutoencoder:
    activations: dict[str, Activation] = {
        "standard": ReLU(),
        "topk": TopK(int(config.get("k", 0))),
        "jumprelu": Threshold(),
    }
    sae = SparseAutoencoder(
        config["d_in"],
        config["d_sae"],
        activations[config["architecture"]],
        tuple(config["metadata"]["training_architecture_details"].get("matryoshka_widths", ())),
        subtract_b_dec=config["apply_b_dec_to_input"],
    )
    if "threshold" in tensors:
        sae.threshold = torch.empty(config["d_sae"])
    sae.load_state_dict(tensors)
    return sae


def check_out(out: Path) -> None:
    """Raises UserError if `out` is a file, or holds things and no run: a run's folder would get lost among them."""
    if not out.exists():
        if above := next((folder for folder in out.parents if folder.exists() and not folder.is_dir()), None):
            raise UserError(f"--out {out} lies under {above}, which is a file; name a folder for the runs")
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder for the runs")
    entries = [entry for entry in out.iterdir() if not entry.name.startswith(".")]
    foreign = [entry for entry in entries if not _may_stand_among_runs(entry)]
    if foreign and not any((entry / FACTS).exists() for entry in entries):
        raise UserError(f"--out {out} holds {foreign[0].name} and no runs; name a new or empty folder")


def _may_stand_among_runs(entry: Path) -> bool:
    if entry.is_dir():
        return (entry / FACTS).exists() or not holds_files(entry)
    return re.fullmatch(r"report\.(json|html)", entry.name) is not None


def holds_files(folder: Path) -> bool:
    """Whether there is anything in it that a killed process did not just leave half-written."""
    return any(not entry.name.endswith(PARTIAL) for entry in folder.iterdir())
