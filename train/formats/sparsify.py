"""EleutherAI's sparsify, which delphi reads: <hookpoint>/cfg.json and sae.safetensors. It keeps the top k of a row."""

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from cache_spec.errors import UserError
from cache_spec.files import readable_json
from train.exported import Exported
from train.formats.saelens import read_sae
from train.saelens import VERSION, architecture_of
from train.stored import Stored, check_tensors, encoder_biases, is_unit, read_object, read_safetensors, whole_number

FILES = ("cfg.json", "sae.safetensors")
CONFIG, WEIGHTS = FILES
AGAIN = "save it again with sparsify"
_MODULE = re.compile(r"(?:^|\.)((?:layers|h|blocks)\.[0-9]{1,6}(?:\.\w+)*)$", re.ASCII)  # it becomes a folder's name
_SITES = {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".attention"}


def write(stored: Stored, *, approximate: bool = False, k: int | None = None) -> Exported:
    """The two files, for a subfolder that is named after the hooked module.

    Raises UserError for what is not a top-k, unless it is to be `approximate`, with `k` latents a row; and for a
    transcoder to another width.
    """
    sae, kind = stored.sae, architecture_of(stored.sae)
    if sae.d_out != sae.d_model:
        raise UserError(
            f"sparsify's decoder writes what its encoder reads, {sae.d_model} values, and this writes {sae.d_out}; "
            "--to saelens can say it"
        )
    is_top_k = "topk" in kind
    if is_top_k and k not in (None, stored.k):
        raise UserError(f"--k {k} would make it another SAE: its own k is {stored.k}; leave --k out")
    if not is_top_k and not approximate:
        raise UserError(
            f"sparsify computes a top-k of each row, and this SAE ({stored.arch}) does not, so its codes would change; "
            "export it --approximate, or --to saelens or dictionary_learning"
        )
    n_kept = stored.k or 0 if is_top_k else _k_for(stored, k)
    transcode = stored.is_transcoder
    ours = stored.tensors | encoder_biases(stored, subtracted=not transcode)
    W_enc, b_enc = _encoder(ours)
    tensors = {"encoder.weight": W_enc.t(), "encoder.bias": b_enc, "W_dec": ours["W_dec"], "b_dec": ours["b_dec"]}
    if "W_skip" in ours:
        tensors["W_skip"] = ours["W_skip"]
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_model),
        "normalize_decoder": bool(is_unit(ours["W_dec"]).all()),
        "num_latents": sae.d_sae,
        "k": n_kept,
        "multi_topk": False,
        "skip_connection": "W_skip" in ours,
        "transcode": transcode,
        "d_in": sae.d_model,
    }
    hookpoint, notes = _hookpoint(stored)
    if not is_top_k:
        gate = " and without its gate" if "r_mag" in ours else ""
        notes.append(
            f"approximate: sparsify keeps the {n_kept} largest codes of each row{gate}, which this SAE does not"
        )
    files = {
        CONFIG: readable_json(cfg),
        WEIGHTS: save({name: tensor.contiguous() for name, tensor in tensors.items()}),
    }
    return Exported(files=files, kind="topk", subfolder=hookpoint, notes=tuple(notes))


def _k_for(stored: Stored, given: int | None) -> int:
    """Latents a row keeps, of an SAE that has no such number: as given, as it was trained, or as it was measured."""
    k = given or stored.k or (round(stored.l0) if stored.l0 else 0)
    if k < 1:
        raise UserError("nothing says how many latents a row of it keeps on average; say it with --k")
    if k > stored.sae.d_sae:
        raise UserError(f"--k {k} is more than its {stored.sae.d_sae} latents; give a smaller one")
    return k


def _encoder(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """W_enc [d_in, d_sae] and its bias [d_sae]; of a gated one the path that says how much."""
    if "r_mag" in tensors:
        return tensors["W_enc"] * tensors["r_mag"].exp(), tensors["b_mag"]
    return tensors["W_enc"], tensors["b_enc"]


def _hookpoint(stored: Stored) -> tuple[str, list[str]]:
    """The module that sparsify would have hooked: the one whose output is reconstructed, without the model's prefix."""
    metadata, out = stored.metadata, "_out" if stored.is_transcoder else ""
    notes = []
    if stored.is_transcoder:
        reads = metadata.get("hf_hook_name") or metadata.get("hook_name")
        notes.append(
            f"sparsify's transcoders read the input of the module they are named after; this one reads {reads}"
        )
    if match := _MODULE.search(str(metadata.get(f"hf_hook_name{out}") or "")):
        return match[1], notes
    if match := re.fullmatch(r"blocks\.([0-9]{1,6})\.hook_(\w{1,64})", str(metadata.get(f"hook_name{out}") or "")):
        return f"layers.{match[1]}{_SITES.get(match[2], f'.{match[2]}')}", notes
    return "sae", [*notes, "nothing says which module it reads; give its folder the module's name, such as layers.12"]


def read(folder: Path) -> Stored:
    """The SAE or transcoder in a folder. Raises UserError that starts with what is wrong with it."""
    cfg, found = read_object(folder / CONFIG), read_safetensors(folder / WEIGHTS)
    if (activation := cfg.get("activation", "topk")) != "topk" or cfg.get("signed"):
        raise UserError(
            f"its activation is {'signed ' if cfg.get('signed') else ''}{activation!s:.80}, not topk; convert it"
        )
    d_in = whole_number(cfg, "d_in")
    d_sae = whole_number(cfg, "num_latents") if cfg.get("num_latents") else d_in * whole_number(cfg, "expansion_factor")
    k, transcode, skip = (
        whole_number(cfg, "k", most=d_sae),
        bool(cfg.get("transcode")),
        bool(cfg.get("skip_connection")),
    )
    if skip and not transcode:
        raise UserError("it is an SAE with a linear path beside its latents, which granary does not have; convert it")
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    check_tensors(found, shapes | ({"W_skip": (d_in, d_in)} if skip else {}), "sparsify's SAE")
    ours = {{"encoder.bias": "b_enc"}.get(name, name): tensor for name, tensor in found.items()}
    ours["W_enc"] = ours.pop("encoder.weight").t()
    metadata = _metadata(folder.resolve().name, k, transcode=transcode)
    plain = {
        "architecture": "topk_skip_transcoder" if skip else "topk",
        "d_in": d_in,
        "d_sae": d_sae,
        "k": k,
        "apply_b_dec_to_input": not transcode,
        "metadata": metadata,
    }
    return Stored(sae=read_sae(plain, ours), metadata=metadata)


def _metadata(hookpoint: str, k: int, *, transcode: bool) -> dict[str, Any]:
    """What the folder's name says: the module whose output an SAE reads, or a transcoder makes."""
    name, out = _hook_name(hookpoint), "_out" if transcode else ""
    return {
        "sae_lens_version": VERSION,
        "model_name": "unknown",
        **({f"hook_name{out}": name} if name else {}),
        **({"hook_name_out": hookpoint} if transcode and not name else {}),
        "training_architecture": "topk",
        "training_architecture_details": {"k": k},
        "granary": {"imported_from": "sparsify", "hookpoint": hookpoint, "config": {"arch": "topk"}},
    }


def _hook_name(hookpoint: str) -> str:
    """`layers.12` -> `blocks.12.hook_resid_post`, in TransformerLens's spelling; empty for a module not known here."""
    match = re.search(r"(?:layers|h)[._](\d+)(?:\.(\w+))?$", hookpoint)
    if not match:
        return ""
    sites = {None: "resid_post", "mlp": "mlp_out", "attention": "attn_out", "self_attn": "attn_out", "attn": "attn_out"}
    return f"blocks.{match[1]}.hook_{sites[match[2]]}" if match[2] in sites else ""
