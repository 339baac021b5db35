"""dictionary_learning and SAEBench: ae.pt, a state dict of torch.save, and config.json with the trainer's settings."""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from cache_spec.errors import UserError
from cache_spec.files import readable_json
from cache_spec.hook_point import SITES, HookPoint
from train.exported import Exported
from train.formats.saelens import read_sae
from train.saelens import VERSION, architecture_of
from train.stored import (
    Stored,
    check_numbers,
    check_tensors,
    encoder_biases,
    is_unit,
    object_in,
    read_object,
    whole_number,
)

FILES = ("config.json", "ae.pt")
CONFIG, WEIGHTS = FILES
UNSET = -1.0  # a threshold before its first value, as dictionary_learning starts it


@dataclass(frozen=True, kw_only=True)
class _Class:
    """A class of dictionary_learning: SAELens's word for what it computes, and its tensors with SAELens's names."""

    plain: str
    tensors: dict[str, str]
    subtracts: bool = True
    has_k: bool = False  # and a threshold, which a top-k does not use
    has_groups: bool = False


_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}  # [out, in], as nn.Linear
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED = {"r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag", "decoder_bias": "b_dec"}
CLASSES = {
    "AutoEncoder": _Class(plain="standard", tensors={**_LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": _Class(plain="standard", tensors={**_LINEAR, "decoder.bias": "b_dec"}, subtracts=False),
    "GatedAutoEncoder": _Class(plain="gated", tensors={"encoder.weight": "W_enc", "decoder.weight": "W_dec", **_GATED}),
    "AutoEncoderTopK": _Class(plain="topk", tensors={**_LINEAR, "b_dec": "b_dec"}, has_k=True),
    "BatchTopKSAE": _Class(plain="jumprelu", tensors={**_LINEAR, "b_dec": "b_dec"}, has_k=True),
    "MatryoshkaBatchTopKSAE": _Class(plain="jumprelu", tensors=_PLAIN, has_k=True, has_groups=True),
    "JumpReluAutoEncoder": _Class(plain="jumprelu", tensors={**_PLAIN, "threshold": "threshold"}, subtracts=False),
}
_TRAINERS = {  # our architecture -> theirs
    "standard": "StandardTrainer",
    "standard_april": "StandardTrainerAprilUpdate",
    "p_anneal": "PAnnealTrainer",
    "gated": "GatedSAETrainer",
    "topk": "TopKTrainer",
    "batchtopk": "BatchTopKTrainer",
    "matryoshka": "MatryoshkaBatchTopKTrainer",
    "jumprelu": "JumpReluTrainer",
}
_OF_CLASS = {  # where nothing else says how it was trained
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard_april",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
    "JumpReluAutoEncoder": "jumprelu",
}
AGAIN = "save it again with dictionary_learning"
_UNREADABLE = (  # what zipfile and torch.load raise for what they cannot read
    *(UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(zipfile.BadZipFile, NotImplementedError, OverflowError, RecursionError, MemoryError, OSError),
)


def write(stored: Stored, *, approximate: bool = False, k: int | None = None) -> Exported:
    """The two files. Raises UserError for transcoders, which dictionary_learning's folders have no words for."""
    if stored.is_transcoder:
        raise UserError(
            "dictionary_learning's folders name one place in the model, and a transcoder has two; "
            "--to saelens or --to sparsify can say it"
        )
    name = _class_of(stored)
    made = CLASSES[name]
    ours = stored.tensors | encoder_biases(stored, subtracted=made.subtracts)
    tensors = {theirs: _turned(theirs, ours[own]) for theirs, own in made.tensors.items()}
    if made.has_k:
        assert stored.k is not None
        tensors |= {"k": torch.tensor(stored.k, dtype=torch.int32), "threshold": _threshold(stored)}
    groups = [end - start for start, end in zip((0, *stored.sae.prefixes), stored.sae.prefixes, strict=False)]
    if made.has_groups:
        tensors["group_sizes"] = torch.tensor(groups)
    data = io.BytesIO()
    torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, data)
    trainer, notes = _trainer(stored, name, groups)
    buffer = {"d_submodule": stored.sae.d_model, "io": "out", "ctx_len": stored.metadata.get("context_size")}
    files = {CONFIG: readable_json({"trainer": trainer, "buffer": buffer}), WEIGHTS: data.getvalue()}
    return Exported(files=files, kind=name, notes=(*notes, *_class_notes(stored, name)))


def _class_of(stored: Stored) -> str:
    """The class that computes exactly the same."""
    sae = stored.sae
    if (architecture := architecture_of(sae)) != "jumprelu":
        return {"standard": "AutoEncoder", "gated": "GatedAutoEncoder", "topk": "AutoEncoderTopK"}[architecture]
    threshold = stored.tensors["threshold"]
    if stored.k is None or not bool((threshold == threshold.reshape(-1)[0]).all()):
        return "JumpReluAutoEncoder"
    return "MatryoshkaBatchTopKSAE" if len(sae.prefixes) > 1 else "BatchTopKSAE"


def _class_notes(stored: Stored, name: str) -> list[str]:
    notes = []
    if name == "JumpReluAutoEncoder" and stored.arch in ("batchtopk", "matryoshka"):
        notes.append("its latents have thresholds of their own, or no k is known, so it is a JumpReluAutoEncoder there")
    if name == "AutoEncoder" and not bool(is_unit(stored.tensors["W_dec"]).all()):
        notes.append("load it with normalize_decoder=False: a decoder row of zeros cannot be given length 1")
    return notes


def _turned(name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if name in ("encoder.weight", "decoder.weight") else tensor


def _threshold(stored: Stored) -> Tensor:
    """A scalar; unset for a top-k, and where it lets every positive pre-activation through."""
    tensors = stored.tensors
    value = tensors["threshold"].reshape(-1)[0] if "threshold" in tensors else torch.tensor(UNSET)
    return torch.where(value < 0, UNSET, value).float()


def _trainer(stored: Stored, name: str, groups: list[int]) -> tuple[dict[str, Any], list[str]]:
    """What config.json says of the training, and what it cannot say."""
    known, metadata, made = stored.trained_with, stored.metadata, CLASSES[name]
    layer, submodule, notes = _place(stored)
    arch = stored.arch if made.plain != "jumprelu" or name != "JumpReluAutoEncoder" else "jumprelu"
    trainer = {
        "trainer_class": _TRAINERS.get(arch, _TRAINERS[_OF_CLASS[name]]),
        "dict_class": name,
        "activation_dim": stored.sae.d_model,
        "dict_size": stored.sae.d_sae,
        **({"k": stored.k} if made.has_k else {}),
        "layer": layer,
        "lm_name": str(metadata.get("model_name") or ""),
        "submodule_name": submodule,
        "seed": known.get("seed"),
        "steps": known.get("steps") or _steps(metadata),
        "lr": known.get("lr"),
        "device": "cpu",
        "wandb_name": str(known.get("name") or name),
    }
    if made.has_groups:
        trainer |= {
            "group_fractions": [size / stored.sae.d_sae for size in groups],
            "group_weights": [1 / len(groups)] * len(groups),
            "group_sizes": groups,
            "top_k_aux": known.get("aux_k") or stored.sae.d_model // 2,
            "auxk_alpha": known.get("auxk_alpha", 1 / 32),
            "threshold_beta": known.get("threshold_beta"),
            "threshold_start_step": known.get("threshold_start"),
            "warmup_steps": known.get("warmup_steps"),
            "decay_start": known.get("decay_start"),
        }
    return trainer, notes


def _steps(metadata: dict[str, Any]) -> int | None:
    data = object_in(object_in(metadata, "granary"), "data")
    n_tokens, batch_size = data.get("n_tokens"), data.get("batch_size")
    if type(n_tokens) is not int or type(batch_size) is not int or batch_size <= 0:
        return None
    return n_tokens // batch_size


def _place(stored: Stored) -> tuple[int | None, str | None, list[str]]:
    """Layer and name of the hooked module, and what readers that look at the layer alone will get wrong."""
    text = str(stored.metadata.get("hook_name") or "")
    try:
        point = HookPoint.parse(text)
    except UserError:
        return None, text or None, [f"its hook point is '{text}', so config.json names no layer"]
    notes = []
    if point.site != "resid_post":
        notes.append(f"config.json has only a layer for SAELens and SAEBench, which take {point} for resid_post")
    return point.layer, f"{point.site}_layer_{point.layer}", notes


def read(folder: Path) -> Stored:
    """The SAE in a folder. Raises UserError that starts with what is wrong with it."""
    trainer = read_object(folder / CONFIG).get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"its {CONFIG} has no trainer, which says what class it is; {AGAIN}")
    name = trainer.get("dict_class")
    if not isinstance(name, str) or name not in CLASSES:
        raise UserError(f"its dict_class is {name!r:.80}, and granary reads {', '.join(CLASSES)}; convert it")
    made, found = CLASSES[name], read_plain_tensors(folder / WEIGHTS)
    d_in, d_sae = whole_number(trainer, "activation_dim"), whole_number(trainer, "dict_size")
    k = _read_k(made, found, trainer, d_sae)
    widths = _read_widths(made, found, d_sae)
    threshold = found.pop("threshold", None) if made.has_k else None
    check_tensors(found, _shapes(made, d_in, d_sae), name)
    ours = {own: _turned(theirs, found[theirs]).float() for theirs, own in made.tensors.items()}
    notes = []
    if made.plain == "jumprelu" and made.has_k:
        if threshold is None or threshold.numel() != 1 or not bool(threshold.isfinite().all()):
            raise UserError(f"its threshold is not one finite number, which {name} has; {AGAIN}")
        ours["threshold"] = threshold.float().reshape(1).expand(d_sae)
        if threshold.item() < 0:
            notes.append(f"its threshold was never set ({threshold.item():g}): every positive pre-activation is on")
    cfg = {"architecture": made.plain, "d_in": d_in, "d_sae": d_sae, "k": k, "apply_b_dec_to_input": made.subtracts}
    metadata = _metadata(trainer, name, k, widths)
    cfg["metadata"] = metadata
    return Stored(sae=read_sae(cfg, ours), metadata=metadata, notes=tuple(notes))


def read_plain_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, which holds a dict of tensors and nothing else; no code of it is run.

    Raises UserError that starts with what is wrong with it.
    """
    if not path.is_file():
        raise UserError(f"it has no {path.name}; {AGAIN}")
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _refuse_packed(path)
        found = torch.load(path, map_location="cpu", weights_only=True) if is_zip else None
    except _UNREADABLE as error:
        why = str(error).strip().split("\n")[0][:120]
        raise UserError(f"its {path.name} is damaged, or holds more than tensors ({why}); {AGAIN}") from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and _is_stored(value) for name, value in found.items()
    ):
        raise UserError(f"its {path.name} is not a dict of tensors as torch.save writes it; {AGAIN}")
    check_numbers(found)
    return {name: value.detach() for name, value in found.items()}


def _refuse_packed(path: Path) -> None:
    """Raises ValueError if a file unpacks to more than it is; torch.save packs nothing."""
    with zipfile.ZipFile(path) as archive:
        n_bytes = sum(member.file_size for member in archive.infolist())
    if n_bytes > path.stat().st_size:
        raise ValueError(f"it would unpack to {n_bytes:,} bytes")


def _is_stored(value: Tensor) -> bool:
    """Whether all of its numbers are in the file: a few can pass for many, which would be copied one day."""
    return (
        value.layout == torch.strided
        and value.device.type == "cpu"
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _read_k(made: _Class, found: dict[str, Tensor], trainer: Mapping[str, Any], d_sae: int) -> int | None:
    """k of the weights, or of config.json for the oldest folders."""
    if not made.has_k:
        return None
    stored = found.pop("k", None)
    facts = trainer if stored is None else {"k": stored.item() if stored.numel() == 1 else None}
    return whole_number(facts, "k", most=d_sae)


def _read_widths(made: _Class, found: dict[str, Tensor], d_sae: int) -> list[int]:
    """The prefixes [n_groups], rising to d_sae; none where there are no groups."""
    if not made.has_groups:
        return []
    sizes = found.pop("group_sizes", torch.empty(0)).reshape(-1).tolist()
    if not sizes or any(type(size) is not int or size < 1 for size in sizes) or sum(sizes) != d_sae:
        raise UserError(f"its group_sizes are {sizes!s:.80}, which do not add up to its dict_size, {d_sae}; {AGAIN}")
    return list(accumulate(sizes))


def _shapes(made: _Class, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a class's weights."""
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    return {
        theirs: tuple(reversed(shapes[own])) if theirs.endswith(".weight") else shapes.get(own, (d_sae,))
        for theirs, own in made.tensors.items()
    }


def _metadata(trainer: Mapping[str, Any], name: str, k: int | None, widths: list[int]) -> dict[str, Any]:
    """What config.json says, under SAELens's names."""
    arches = {theirs: ours for ours, theirs in _TRAINERS.items()}
    arch = arches.get(str(trainer.get("trainer_class")), _OF_CLASS[name])
    details: dict[str, Any] = {"k": k} if k else {}
    if len(widths) > 1:
        details["matryoshka_widths"] = widths
    known = {key: trainer[key] for key in ("seed", "steps", "lr") if isinstance(trainer.get(key), int | float)}
    hook = _hook_name(trainer.get("layer"), trainer.get("submodule_name"))
    return {
        "sae_lens_version": VERSION,
        "model_name": str(trainer.get("lm_name") or "unknown"),
        **({"hook_name": hook} if hook else {}),
        "training_architecture": "matryoshka_batchtopk" if arch == "matryoshka" else arch,
        "training_architecture_details": details,
        "granary": {"imported_from": "dictionary_learning", "config": {"arch": arch, **known}},
    }


def _hook_name(layer: Any, submodule: Any) -> str:
    """In TransformerLens's spelling; empty if nothing says which."""
    for site in SITES:
        if submodule == f"{site}_layer_{layer}":
            return f"blocks.{layer}.hook_{site}"
    return f"blocks.{layer}.hook_resid_post" if type(layer) is int and layer >= 0 else ""
