"""SAELens 6: cfg.json and sae_weights.safetensors, which a run's folder has already."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from cache_spec.errors import UserError
from cache_spec.files import readable_json
from train.exported import Exported
from train.run_folder import CFG, WEIGHTS
from train.sae import SparseAutoencoder
from train.saelens import PLAIN, VERSION, architecture_of, assemble, config_with, fold
from train.stored import Stored, check_tensors, read_object, read_safetensors

FILES = (CFG, WEIGHTS)
AGAIN = "save it again with SAELens 6"
FOLD = "fold it into the weights in SAELens (sae.fold_activation_norm_scaling_factor) and save it again"
_SKIP = [f"{prefix}{skip}transcoder" for prefix in PLAIN.values() for skip in ("", "skip_")]
_IN_USE = {  # architecture of a cfg.json -> what it computes in use
    **{name: name for name in (*PLAIN, *_SKIP)},
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}
_OURS_ALONE = ("topk_transcoder", "topk_skip_transcoder", "gated_transcoder", "gated_skip_transcoder")
_DEFAULTS = {  # what SAELens can do beside, and the only value that is computed here
    "reshape_activations": "none",
    "activation_fn_str": "relu",
    "activation_fn": "relu",
    "finetuning_scaling_factor": False,
}
_ONCE_AT_TOP = ("model_name", "hook_name", "dataset_path", "context_size", "prepend_bos")  # before SAELens 6


def read(folder: Path) -> Stored:
    """The SAE in a folder. Raises UserError that starts with what is wrong with it."""
    cfg, tensors = read_object(folder / CFG), read_safetensors(folder / WEIGHTS)
    _check_cfg(cfg)
    try:
        sae = read_sae(cfg, tensors)
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"its {CFG} and {WEIGHTS} do not fit together ({error}); {AGAIN}") from error
    return Stored(sae=sae, metadata=_kept_metadata(cfg))


def write(stored: Stored, *, approximate: bool = False, k: int | None = None) -> Exported:
    """The two files. Raises UserError for a transcoder that SAELens has no class for."""
    if (architecture := architecture_of(stored.sae)) in _OURS_ALONE:
        raise UserError(f"SAELens has no {architecture.replace('_', ' ')}; granary reads the run's folder as it is")
    cfg = config_with(stored.sae, stored.metadata)
    return Exported(files={CFG: readable_json(cfg), WEIGHTS: save(stored.tensors)}, kind=architecture)


def _check_cfg(cfg: dict[str, Any]) -> None:
    """Raises UserError for what is read of a cfg.json, if it is there, and is no such thing."""
    if not isinstance(_metadata(cfg), dict):
        raise UserError(f"its metadata is {json.dumps(cfg['metadata'])[:40]}, not a JSON object; {AGAIN}")
    for name in ("d_in", "d_sae", *(["d_out"] if "d_out" in cfg else [])):
        if type(cfg.get(name)) is not int or cfg[name] < 1:
            shown = json.dumps(cfg[name])[:40] if name in cfg else "missing"
            raise UserError(f"its {name} is {shown}, not a whole number above 0; {AGAIN}")
    subtracts = cfg.get("apply_b_dec_to_input", True)
    if type(subtracts) is not bool:  # any other text would pass for true
        raise UserError(f"its apply_b_dec_to_input is {json.dumps(subtracts)[:40]}, not true or false; {AGAIN}")
    k, d_sae = cfg.get("k"), cfg.get("d_sae", math.inf)
    if k is not None and not (type(k) in (int, float) and 0 <= k <= d_sae and k < math.inf):
        raise UserError(f"its k is {json.dumps(k)[:40]}, not a number from 0 to its d_sae, {d_sae}; {AGAIN}")


def _metadata(cfg: Mapping[str, Any]) -> Any:
    return cfg.get("metadata") or {}


def _kept_metadata(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What the cfg.json says of the training, where SAELens 6 has it."""
    metadata = {name: cfg[name] for name in _ONCE_AT_TOP if name in cfg} | _metadata(cfg)
    metadata.setdefault("training_architecture", str(cfg.get("architecture", "standard")))
    if cfg.get("k") and not isinstance(metadata.get("training_architecture_details"), dict):
        metadata["training_architecture_details"] = {"k": cfg["k"]}
    metadata.setdefault("training_architecture_details", {})
    major = str(metadata.get("sae_lens_version")).partition(".")[0]
    if not re.fullmatch("[0-9]{1,9}", major) or int(major) < 6:
        metadata["sae_lens_version"] = VERSION  # the format that it is written in, if it is
    return metadata


def read_sae(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SparseAutoencoder:
    """The SAE of a cfg.json and tensors of SAELens 6: raw activations in, decoder rows of length 1 (but for topk's).

    Raises UserError if it does something that is not computed here. What is folded into the weights computes the same:
    codes rescaled by decoder norms, and a known factor that its activations are normalised by.
    """
    plain = _IN_USE.get(str(cfg.get("architecture", "standard")))
    if plain is None:
        raise UserError(
            f"its architecture is '{cfg.get('architecture')!s:.80}', and granary computes {', '.join(_IN_USE)}; "
            "convert it"
        )
    for key, wanted in _DEFAULTS.items():
        if cfg.get(key, wanted) not in (wanted, None):
            raise UserError(
                f"its {key} is {cfg[key]!s:.80}, and granary computes {wanted} alone; convert it in SAELens"
            )
    found = {name: tensor.float() for name, tensor in tensors.items()}
    if plain == "jumprelu" and "topk_threshold" in found:
        found["threshold"] = found.pop("topk_threshold").reshape(1).expand(int(cfg["d_sae"]))
    check_tensors(found, _shapes(plain, cfg), f"SAELens's {plain}")
    found = _normalised(found, cfg)
    if cfg.get("rescale_acts_by_decoder_norm"):
        lengths = found["W_dec"].norm(dim=1)
        found |= {
            "W_enc": found["W_enc"] * lengths,
            "b_enc": found["b_enc"] * lengths,
            "W_dec": found["W_dec"] / lengths[:, None],
        }
    is_transcoder = plain.endswith("transcoder")
    if is_transcoder and cfg.get("apply_b_dec_to_input"):
        raise UserError("its apply_b_dec_to_input is true, and a transcoder's b_dec belongs to the output; convert it")
    config = {
        "architecture": plain,
        "d_in": int(cfg["d_in"]),
        "d_sae": int(cfg["d_sae"]),
        "d_out": int(cfg.get("d_out", cfg["d_in"])),
        "k": int(cfg["k"]) if "topk" in plain else 0,
        "apply_b_dec_to_input": not is_transcoder and bool(cfg.get("apply_b_dec_to_input", True)),  # as SAELens has it
        "metadata": {"training_architecture_details": {"matryoshka_widths": _widths(cfg)}},
    }
    sae = assemble(config, fold(assemble(config, found), 1.0))
    return sae.eval().requires_grad_(False)


def _shapes(plain: str, cfg: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one architecture."""
    d_in, d_sae = int(cfg["d_in"]), int(cfg["d_sae"])
    d_out = int(cfg.get("d_out", d_in)) if plain.endswith("transcoder") else d_in
    vectors = ["b_gate", "b_mag", "r_mag"] if "gated" in plain else ["b_enc"]
    vectors += ["threshold"] if "jumprelu" in plain else []
    skip = {"W_skip": (d_out, d_in)} if "skip" in plain else {}
    return {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), **skip} | dict.fromkeys(
        vectors, (d_sae,)
    )


def _widths(cfg: Mapping[str, Any]) -> tuple[int, ...]:
    """The prefixes of a Matryoshka SAE, which no encode and no decode depends on; none if they are not well formed."""
    details = _metadata(cfg).get("training_architecture_details")
    widths = details.get("matryoshka_widths") if isinstance(details, dict) else None
    if not isinstance(widths, list) or not all(type(width) is int and width > 0 for width in widths):
        return ()
    complete = widths if widths and widths[-1] == cfg["d_sae"] else [*widths, cfg["d_sae"]]
    return tuple(complete) if complete == sorted(set(complete)) else ()


def _normalised(tensors: dict[str, Tensor], cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the SAE that takes activations as they are, if that is known."""
    how = cfg.get("normalize_activations") or "none"
    if how == "none":
        return tensors
    factor = cfg.get("norm_scaling_factor")
    if how != "expected_average_only_in" or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise UserError(
            f"its activations are normalised ({how!s:.80}) by a factor that the folder does not hold; {FOLD}"
        )
    return tensors | {
        "W_enc": tensors["W_enc"] * factor,
        "W_dec": tensors["W_dec"] / factor,
        "b_dec": tensors["b_dec"] / factor,
    }
