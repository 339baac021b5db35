"""Our SAE as SAELens 6 stores it, and back: tensors in raw units, and what cfg.json says of them.

SAELens has no transcoder with a top-k and none with a gate. Those are stored as `topk` and `gated` SAEs that leave
b_dec alone, which comes to the same; only where the output has another width, or there is a skip, that does not do,
and they get names of their own (`topk_transcoder`) that SAELens refuses.
"""

from typing import Any

import torch
from torch import Tensor

from train.activations import Activation, ReLU, Threshold, TopK
from train.sae import SparseAutoencoder

VERSION = "6.54.12"  # the format we write; from 6.0.0 on SAELens reads it as it is
_THEIR_NAMES = {  # our architecture -> SAELens's, where they differ
    "matryoshka": "matryoshka_batchtopk",
    "standard_april": "standard",
    "p_anneal": "standard",
}
PLAIN = {"standard": "", "jumprelu": "jumprelu_", "topk": "topk_", "gated": "gated_"}  # -> a transcoder's prefix
_NEARLY_ONE = 1e-5  # decoder rows that are kept at length 1 are off by rounding, which is not worth another rounding


@torch.no_grad()
def fold(sae: SparseAutoencoder, norm_factor: float, target_norm_factor: float | None = None) -> dict[str, Tensor]:
    """The tensors of an SAE that does on x what `sae` does on x / norm_factor, with codes norm_factor times larger.

    Thresholds are in the units of the codes, so they grow with them. Decoder rows get length 1, and the codes and
    thresholds their former length; a row of zeros stays, and so do the rows of a top-k, which compares codes as they
    are. A transcoder's output is in units of `target_norm_factor`, and its codes grow with that.
    """
    scale = norm_factor if target_norm_factor is None else target_norm_factor
    lengths = _lengths(sae)
    gain = lengths * scale
    tensors = {
        "W_enc": sae.W_enc * lengths * (scale / norm_factor),
        "W_dec": sae.W_dec / lengths[:, None],
        "b_dec": sae.b_dec * scale,
    }
    if sae.r_mag is None or sae.b_mag is None:
        tensors["b_enc"] = sae.b_enc * gain
    else:
        tensors |= {"b_gate": sae.b_enc * gain, "b_mag": sae.b_mag * gain, "r_mag": sae.r_mag}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold * gain
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.t() * (scale / norm_factor)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _lengths(sae: SparseAutoencoder) -> Tensor:
    """[d_sae] what to divide the decoder rows by."""
    lengths = sae.W_dec.norm(dim=1)
    if isinstance(sae.activation, TopK):
        return torch.ones_like(lengths)
    return torch.where(((lengths - 1).abs() < _NEARLY_ONE) | (lengths == 0), 1.0, lengths)


def saelens_config(sae: SparseAutoencoder, facts: dict[str, Any]) -> dict[str, Any]:
    """cfg.json as SAELens 6 reads it; our own facts stand under metadata.granary."""
    config, cache = facts["config"], facts["cache"]
    metadata = {
        "sae_lens_version": VERSION,
        "model_name": cache["model"],
        "hook_name": cache["tl_name"],
        "hf_hook_name": cache["hf_name"],
        "dataset_path": cache["dataset"],
        "context_size": cache["window_tokens"],
        "prepend_bos": cache["prepend_bos"],
        "training_architecture": _THEIR_NAMES.get(config["arch"], config["arch"]),
        "training_architecture_details": {"matryoshka_widths": list(sae.prefixes)} if len(sae.prefixes) > 1 else {},
        "granary": {"name": facts["name"], "config": config, "data": facts["data"], "cache_id": cache["cache_id"]},
    }
    if target := cache.get("target"):
        metadata |= {"hook_name_out": target["tl_name"], "hf_hook_name_out": target["hf_name"]}
    return config_with(sae, metadata)


def config_with(sae: SparseAutoencoder, metadata: dict[str, Any]) -> dict[str, Any]:
    """cfg.json of an SAE in raw units, of which the metadata says where it comes from."""
    k = sae.activation.k if isinstance(sae.activation, TopK) else None
    architecture = architecture_of(sae)
    return {
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        **({"d_out": sae.d_out} if architecture.endswith("transcoder") else {}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"k": k, "rescale_acts_by_decoder_norm": False} if k else {}),
        "metadata": metadata,
        "architecture": architecture,
    }


def architecture_of(sae: SparseAutoencoder) -> str:
    """SAELens's name for what the SAE does in use, or ours where there is none."""
    if sae.r_mag is not None:
        plain = "gated"
    elif isinstance(sae.activation, TopK):
        plain = "topk"
    else:
        plain = "standard" if sae.threshold is None else "jumprelu"
    same_shape = sae.W_skip is None and sae.d_out == sae.d_model
    if not sae.is_transcoder or (plain in ("topk", "gated") and same_shape):
        return plain
    return f"{PLAIN[plain]}{'' if sae.W_skip is None else 'skip_'}transcoder"


def _misfit(config: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """What is no such thing in a cfg.json, or of another size than the tensors; empty if nothing.

    Asked before memory is taken for what the cfg.json says.
    """
    architecture, d_in, d_sae, k = (config.get(name) for name in ("architecture", "d_in", "d_sae", "k"))
    if not isinstance(architecture, str):
        return f"its architecture is {architecture!r:.40}"
    is_transcoder = architecture.endswith("transcoder")
    d_out = config.get("d_out") if is_transcoder else d_in
    sizes = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            return f"its {name} is {size!r:.40}"
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "W_skip": (d_out, d_in)}
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            return f"its {name} has the shape {list(tensors[name].shape)}, not {list(shape)}"
    if missing := sorted({"W_enc", "W_dec"} - tensors.keys()):
        return f"it has no {missing[0]}"
    if k is not None and not (type(k) in (int, float) and 0 <= k <= d_sae):  # pyright: ignore[reportOperatorIssue]
        return f"its k is {k!r:.40}"
    if type(config.get("apply_b_dec_to_input")) is not bool or (is_transcoder and config["apply_b_dec_to_input"]):
        return f"its apply_b_dec_to_input is {config.get('apply_b_dec_to_input')!r:.40}"
    if "W_skip" in tensors and not is_transcoder:
        return "it is no transcoder and has a W_skip"
    return "" if not (widths := _prefixes(config)) or widths[-1] == d_sae else "its matryoshka_widths end elsewhere"


def _prefixes(config: dict[str, Any]) -> tuple[int, ...]:
    """The prefixes that a cfg.json tells of; none if it tells of none. Raises RuntimeError if they do not rise."""
    found: Any = config
    for name in ("metadata", "training_architecture_details", "matryoshka_widths"):
        if not isinstance(found, dict):
            raise RuntimeError(f"it has no {name}")
        found = found.get(name, () if name == "matryoshka_widths" else None)
    widths: tuple[Any, ...] = tuple(found) if isinstance(found, list | tuple) else (None,)
    if not all(type(width) is int and width > 0 for width in widths) or list(widths) != sorted(set(widths)):
        raise RuntimeError(f"its matryoshka_widths are {found!r:.40}")
    return widths


def assemble(config: dict[str, Any], tensors: dict[str, Tensor]) -> SparseAutoencoder:
    """The SAE of a cfg.json and its tensors. Raises KeyError or RuntimeError if they do not fit together."""
    if fault := _misfit(config, tensors):
        raise RuntimeError(fault)
    architecture = config["architecture"]
    plain = architecture.removesuffix("transcoder").removesuffix("skip_").removesuffix("_") or "standard"
    activations: dict[str, Activation] = {
        "standard": ReLU(),
        "gated": ReLU(),
        "topk": TopK(int(config.get("k", 0))),
        "jumprelu": Threshold(),
    }
    sae = SparseAutoencoder(
        config["d_in"],
        config["d_sae"],
        activations[plain],
        _prefixes(config),
        subtract_b_dec=config["apply_b_dec_to_input"],
        gated=plain == "gated",
        d_out=config["d_out"] if architecture.endswith("transcoder") else None,
        skip="W_skip" in tensors,
    )
    if "threshold" in tensors:
        sae.threshold = torch.empty(config["d_sae"])
    ours = {{"b_gate": "b_enc"}.get(name, name): tensor for name, tensor in tensors.items()}
    if "W_skip" in ours:
        ours["W_skip"] = ours["W_skip"].t()
    sae.load_state_dict(ours)
    return sae
