"""An SAE as a folder of some tool holds it: what it computes on raw rows, and what is known of where it comes from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cache_spec.errors import CacheDamaged, UserError
from cache_spec.untrusted import json_of, read_bounded, refuse_links
from train.activations import TopK
from train.sae import SparseAutoencoder
from train.saelens import architecture_of, fold

AGAIN = "save it again with the tool that made it"
FLOAT = "save it again as float32"
_NUMBERS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
MOST_WEIGHTS = 2**40  # bytes of one file of weights; no SAE comes near


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """An SAE that takes activations as they are. metadata: as SAELens names such facts. l0: measured, if it is known.

    notes: what a user has to know of it, as sentences.
    """

    sae: SparseAutoencoder
    metadata: dict[str, Any]
    l0: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its weights under SAELens's names; decoder rows have length 1, but for a top-k's."""
        return fold(self.sae, 1.0)

    @property
    def is_transcoder(self) -> bool:
        """Also where it is stored as an SAE that computes the same."""
        return self.sae.is_transcoder or bool(self.metadata.get("hook_name_out"))

    @property
    def trained_with(self) -> dict[str, Any]:
        """The settings of the training that are known."""
        ours = object_in(self.metadata, "granary")
        return {**object_in(self.metadata, "training_architecture_details"), **object_in(ours, "config")}

    @property
    def k(self) -> int | None:
        """How many latents a row keeps, in use or, for a thresholded one, as it was trained; None if none was set."""
        if isinstance(self.sae.activation, TopK):
            return self.sae.activation.k
        k = self.trained_with.get("k")
        return k if type(k) is int and 0 < k <= self.sae.d_sae and self.arch in ("batchtopk", "matryoshka") else None

    @property
    def arch(self) -> str:
        """What granary calls the architecture it was trained as, as far as that is known."""
        trained_as = self.trained_with.get("arch") or self.metadata.get("training_architecture")
        named = {"matryoshka_batchtopk": "matryoshka"}.get(str(trained_as), trained_as)
        return str(named or architecture_of(self.sae))


def object_in(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What stands under a name if it is a JSON object; an empty one otherwise."""
    value = facts.get(name)
    return value if isinstance(value, dict) else {}


def is_unit(decoder: Tensor) -> Tensor:
    """[d_sae] whether each decoder row [d_sae, d_out] has length 1."""
    return (decoder.norm(dim=1) - 1).abs() < 1e-4


@torch.no_grad()
def encoder_biases(stored: Stored, *, subtracted: bool) -> dict[str, Tensor]:
    """The biases of the encoder for a tool that subtracts b_dec from the input, or one that does not.

    The difference is one constant a latent, b_dec W_enc, which is added where the SAE does not do as the tool does.
    """
    sae, tensors = stored.sae, stored.tensors
    names = [name for name in ("b_enc", "b_gate", "b_mag") if name in tensors]
    if sae.subtract_b_dec == subtracted:
        return {name: tensors[name] for name in names}
    shift = tensors["b_dec"].double() @ tensors["W_enc"].double() * (1.0 if subtracted else -1.0)
    gains = {"b_mag": tensors["r_mag"].double().exp()} if "r_mag" in tensors else {}
    return {name: (tensors[name].double() + shift * gains.get(name, 1.0)).float() for name in names}


def refuse_links_in(folder: Path) -> None:
    """Raises UserError if anything in an SAE's folder is a link, but for those of the hub's own cache to its blobs."""
    place = folder.resolve()
    snapshots = next((above for above in place.parents if above.name == "snapshots"), None)
    if snapshots is not None and (blobs := snapshots.parent / "blobs").is_dir():
        away = [path for path in place.rglob("*") if path.is_symlink() and blobs not in path.resolve().parents]
        if away:
            raise UserError(f"{away[0]} is a link out of the hub's cache; download the SAE again")
        return
    try:
        refuse_links(folder, "an SAE's folder has none: put the file itself there, or download it again")
    except CacheDamaged as error:
        raise UserError(str(error)) from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError that starts with what is wrong with it."""
    try:
        facts = json_of(read_bounded(path), finite=True)
    except FileNotFoundError:
        raise UserError(f"it has no {path.name}; {AGAIN}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"its {path.name} cannot be read ({error}); download or save it again") from None
    if not isinstance(facts, dict):
        raise UserError(f"its {path.name} is not a JSON object; {AGAIN}")
    return facts


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises UserError that starts with what is wrong with it."""
    try:
        tensors = load(read_bounded(path, MOST_WEIGHTS))
    except (OSError, ValueError, SafetensorError, KeyError) as error:  # KeyError: a type of numbers that torch has not
        raise UserError(f"its {path.name} cannot be read ({error}); download or save it again") from None
    check_numbers(tensors)
    return tensors


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError unless all are numbers that float32 can stand for.

    Of a complex one torch would throw a part away; with quantized ones and some of 8 bits it can do next to nothing.
    """
    for name, tensor in tensors.items():
        if tensor.is_quantized or tensor.dtype not in _NUMBERS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"its {name} has numbers of the type {kind}, which granary does not compute with; {FLOAT}")


def whole_number(facts: Mapping[str, Any], name: str, *, most: float = 2**31) -> int:
    """A count that a file states. Raises UserError for anything but a whole number from 1 on."""
    value = facts.get(name)
    if type(value) is not int or not 1 <= value <= most:
        shown = json.dumps(value)[:40] if name in facts else "missing"
        raise UserError(f"its {name} is {shown}, not a whole number above 0; {AGAIN}")
    return value


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises UserError unless these are the tensors, of the wanted shapes, all numbers finite. `what`: who has them."""
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"its weights lack {', '.join(missing)}, which {what} has; {AGAIN}")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise UserError(f"its weights hold {', '.join(unknown)}, which {what} does not have; convert it, or {AGAIN}")
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise UserError(f"its {name} has the shape {list(found[name].shape)}, not {list(shape)}; {AGAIN}")
        if not bool(found[name].isfinite().all()):
            raise UserError(f"its {name} holds NaN or infinity; {AGAIN}")
