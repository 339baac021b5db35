"""SAEs of others: a folder or hub repository in the format of SAELens 6, read as far as it is computed exactly."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cache_spec import ActivationCache, HookPlan, UserError
from evaluate.cases import REPORT, Case, Place, check_sae, file_hash, safe_name
from evaluate.controls import subject_of_sae
from evaluate.recipes import PRETRAINED, Recipe
from train.run_folder import CFG, WEIGHTS
from train.sae import SparseAutoencoder
from train.saelens import assemble, fold

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?")
_IN_USE = {  # architecture of a cfg.json -> what it computes in use
    "standard": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}
_TENSORS = {"W_enc", "W_dec", "b_enc", "b_dec", "b_gate", "b_mag", "r_mag", "threshold", "topk_threshold"}
_PLAIN = {  # what SAELens can do beside, and the only value that is computed here
    "reshape_activations": "none",
    "activation_fn_str": "relu",
    "activation_fn": "relu",
    "finetuning_scaling_factor": False,
}
FOLD = "fold it into the weights in SAELens (sae.fold_activation_norm_scaling_factor) and save it again"
AGAIN = "save it again with SAELens 6"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """An SAE that somebody else trained. name: the folder or hub id as it was given. cfg: its cfg.json."""

    name: str
    folder: Path
    sae: SparseAutoencoder
    cfg: Mapping[str, Any]

    @property
    def hook_name(self) -> str:
        """Where its cfg.json says that it reads; empty if it does not say."""
        return str(_metadata(self.cfg).get("hook_name") or self.cfg.get("hook_name") or "")


def find_pretrained(text: str) -> Pretrained:
    """The SAE at `folder`, `owner/name` or `owner/name:subfolder` on the hub. Raises UserError if it cannot be had."""
    folder = Path(text) if Path(text).is_dir() else _download(text)
    try:
        cfg = json.loads((folder / CFG).read_text())
        tensors = load((folder / WEIGHTS).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"--sae {text} has no {Path(str(error.filename)).name}; give a SAELens folder") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"--sae {text} cannot be read ({error}); download or save it again") from error
    try:
        _check_cfg(cfg)
        return Pretrained(name=text, folder=folder, sae=read_sae(cfg, tensors), cfg=cfg)
    except UserError as error:
        raise UserError(f"--sae {text}: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"--sae {text}: {CFG} and {WEIGHTS} do not fit together ({error}); {AGAIN}") from error


def _check_cfg(cfg: Any) -> None:
    """Raises UserError for what is read of a cfg.json, if it is there, and is no such thing."""
    if not isinstance(cfg, dict):
        raise UserError(f"its {CFG} is not a JSON object; {AGAIN}")
    if not isinstance(_metadata(cfg), dict):
        raise UserError(f"its metadata is {json.dumps(cfg['metadata'])[:40]}, not a JSON object; {AGAIN}")
    for name in ("d_in", "d_sae"):
        if name in cfg and (type(cfg[name]) is not int or cfg[name] < 1):
            raise UserError(f"its {name} is {json.dumps(cfg[name])[:40]}, not a whole number above 0; {AGAIN}")
    k, d_sae = cfg.get("k"), cfg.get("d_sae", math.inf)
    if k is not None and not (type(k) in (int, float) and 0 <= k <= d_sae and k < math.inf):
        raise UserError(f"its k is {json.dumps(k)[:40]}, not a number from 0 to its d_sae, {d_sae}; {AGAIN}")


def _metadata(cfg: Mapping[str, Any]) -> Any:
    return cfg.get("metadata") or {}


def _download(text: str) -> Path:
    """The folder that the hub's two files are in, from its cache where they were fetched before."""
    match = _HUB_ID.fullmatch(text)
    if not match:
        raise UserError(f"--sae {text} is neither a folder nor owner/name or owner/name:subfolder; check the spelling")
    repository, subfolder = match[1], match[2] or ""
    try:
        paths = [hf_hub_download(repository, f"{subfolder}/{name}".lstrip("/")) for name in (CFG, WEIGHTS)]
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"--sae {text} is not a folder here and cannot be downloaded (offline, or HF_HUB_OFFLINE is set); "
            "check the spelling and the network"
        ) from error
    except (HfHubHTTPError, HTTPError, HFValidationError, OSError) as error:
        why = str(error).strip().split("\n")[0]
        raise UserError(f"--sae {text} is no folder here, and the hub has no SAE of that name ({why})") from error
    return Path(paths[-1]).parent


def read_sae(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SparseAutoencoder:
    """The SAE of a cfg.json and tensors of SAELens 6: raw activations in, decoder rows of length 1 (but for topk's).

    Raises UserError if it does something that is not computed here. What is folded into the weights computes the same:
    codes rescaled by decoder norms, and a known factor that its activations are normalised by.
    """
    plain = _IN_USE.get(str(cfg.get("architecture", "standard")))
    if plain is None:
        raise UserError(
            f"its architecture is '{cfg.get('architecture')}', and evaluate computes {', '.join(_IN_USE)}; convert it"
        )
    for key, wanted in _PLAIN.items():
        if cfg.get(key, wanted) not in (wanted, None):
            raise UserError(f"its {key} is {cfg[key]}, and evaluate computes {wanted} alone; convert it in SAELens")
    if unknown := sorted(tensors.keys() - _TENSORS):
        raise UserError(
            f"its weights hold {', '.join(unknown)}, which evaluate knows nothing of; convert it in SAELens"
        )
    found = _normalised({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, cfg)
    if plain == "jumprelu" and "topk_threshold" in found:
        found["threshold"] = found.pop("topk_threshold").expand(int(cfg["d_sae"])).contiguous()
    if cfg.get("rescale_acts_by_decoder_norm"):
        lengths = found["W_dec"].norm(dim=1)
        found |= {
            "W_enc": found["W_enc"] * lengths,
            "b_enc": found["b_enc"] * lengths,
            "W_dec": found["W_dec"] / lengths[:, None],
        }
    config = {
        "architecture": plain,
        "d_in": int(cfg["d_in"]),
        "d_sae": int(cfg["d_sae"]),
        "k": int(cfg["k"]) if plain == "topk" else 0,
        "apply_b_dec_to_input": bool(cfg.get("apply_b_dec_to_input", True)),  # SAELens's own default
        "metadata": {"training_architecture_details": {}},
    }
    sae = assemble(config, fold(assemble(config, found), 1.0))
    return sae.eval().requires_grad_(False)


def _normalised(tensors: dict[str, Tensor], cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the SAE that takes activations as they are, if that is known."""
    how = cfg.get("normalize_activations") or "none"
    if how == "none":
        return tensors
    factor = cfg.get("norm_scaling_factor")
    if how != "expected_average_only_in" or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise UserError(f"its activations are normalised ({how}) by a factor that the folder does not hold; {FOLD}")
    return tensors | {
        "W_enc": tensors["W_enc"] * factor,
        "W_dec": tensors["W_dec"] / factor,
        "b_dec": tensors["b_dec"] / factor,
    }


def hook_of(pretrained: Pretrained, cache: ActivationCache, given: str) -> HookPlan:
    """The hook point of a cache to measure on: the given one, the SAE's own, or the only one.

    Raises CacheError if the cache does not hold it, and UserError if there are several and nothing says which.
    """
    own = {name: hook for hook in cache.plan.hooks for name in (hook.tl_name, hook.hf_name, hook.hook_point)}
    if given:
        hook = cache.hook(given)
    elif pretrained.hook_name in own:
        hook = own[pretrained.hook_name]
    elif len(cache.plan.hooks) == 1 and not pretrained.hook_name:
        hook = cache.plan.hooks[0]
    else:
        names = ", ".join(hook.name for hook in cache.plan.hooks)
        reads = f"reads {pretrained.hook_name}" if pretrained.hook_name else "does not say where it reads"
        raise UserError(f"--sae {pretrained.name} {reads}, and {cache.path} holds {names}; name one with --hook")
    try:
        check_sae(pretrained.sae, hook)
    except UserError as error:
        raise UserError(f"--sae {pretrained.name}: {error}") from error
    return hook


def pretrained_case(pretrained: Pretrained, place: Place, out: Path) -> Case:
    """A case of its own: measured at its own threshold, and paired with nothing."""
    sae, cfg = pretrained.sae, pretrained.cfg
    trained_as = _metadata(cfg).get("training_architecture") or cfg.get("architecture", "standard")
    recipe = Recipe(
        bench=place.name,
        arch=str(trained_as),
        k=int(cfg["k"]) if cfg.get("k") else 0,
        d_sae=sae.d_sae,
        name=pretrained.name,
        kind=PRETRAINED,
    )
    return Case(
        name=pretrained.name,
        recipe=recipe,
        seed=0,
        make=lambda: subject_of_sae(pretrained.name, sae.to(place.device), 0.0, place.bench, seed=place.seed),
        report=out / safe_name(pretrained.name) / REPORT,
        facts={"files": {name: file_hash(pretrained.folder / name) for name in (CFG, WEIGHTS)}},
    )
