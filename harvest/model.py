"""The model: loaded from a short name, a hub id or a folder, and read or changed at its hook points.

Adding a family of models is one row of FAMILIES; adding a short name is one row of SHORT_NAMES.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from harvest import embedded


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family of models keeps what is hooked; paths from the whole model, then from one layer.

    `attn_out` and `mlp_out` are the modules whose output is added to the residual stream. `attention` names the
    implementation if the default of transformers cannot be trusted.
    """

    layers: str
    attn_out: str
    mlp_out: str
    attention: str | None = None


_LLAMA = Family(layers="model.layers", attn_out="self_attn", mlp_out="mlp")

FAMILIES = {  # by the `model_type` in a model's config.json
    "gpt_neox": Family(layers="gpt_neox.layers", attn_out="attention", mlp_out="mlp"),
    "gpt2": Family(layers="transformer.h", attn_out="attn", mlp_out="mlp"),
    "gemma2": Family(layers="model.layers", attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm"),
    "llama": _LLAMA,
    "qwen3": _LLAMA,
}


@dataclass(frozen=True, kw_only=True)
class ShortName:
    """A model people ask for often: its hub id or folder, and what to harvest when nothing else is said."""

    source: str
    layers: str
    dtype: str = "auto"
    dataset: str = "monology/pile-uncopyrighted"
    window_tokens: int = 1024


SHORT_NAMES = {
    "tiny": ShortName(
        source=str(embedded.FOLDER),
        layers=str(embedded.HOOK_POINT),
        dataset="embedded",
        window_tokens=embedded.WINDOW_TOKENS,
    ),
    "pythia-70m": ShortName(source="EleutherAI/pythia-70m-deduped", layers="3"),
    "pythia-160m": ShortName(source="EleutherAI/pythia-160m-deduped", layers="8"),
    "gpt2": ShortName(source="openai-community/gpt2", layers="8"),
    "gemma-2-2b": ShortName(source="google/gemma-2-2b", layers="12", dtype="bfloat16"),
}


def defaults(name: str) -> ShortName:
    """What a model's short name stands for; for any other name, no layers."""
    return SHORT_NAMES.get(name, ShortName(source=name, layers=""))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A causal language model that is ready to run: evaluation mode, no gradients."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str  # loads the same model again: a short name, a hub id or the absolute path of a folder
    revision: str  # the hub's commit, or "sha256:..." over a folder's config and weights
    family: str
    n_layers: int
    d_model: int
    device: torch.device
    dtype: torch.dtype


def load_model(name: str, *, device: str = "cpu", dtype: str = "auto", weights: bool = True) -> LoadedModel:
    """Load a model and its tokenizer; code that comes with a model is never run.

    `name` is one of SHORT_NAMES, a hub id (`owner/name`, or `owner/name@revision`) or a folder that
    `save_pretrained` wrote. `dtype` auto is bfloat16 for a checkpoint in bfloat16 and float32 for any other: small
    models released in float16 lose accuracy when run in it.

    Raises UserError for a name that leads to no model, a gated model, an unknown architecture, weights that do not
    fill the model, and a device that is not there.
    """
    disable_progress_bar()  # it is about reading a file; the commands show their own progress
    torch_device = _device(device)
    source, commit = _locate(name)
    at_commit = {"revision": commit} if commit else {}
    config, _ = PreTrainedConfig.get_config_dict(source, **at_commit)
    family = config.get("model_type", "")
    if family not in FAMILIES:
        raise UserError(
            f"'{name}' is a {family or 'nameless'} model; granary knows the layers of {', '.join(sorted(FAMILIES))} "
            "(one row in harvest/model.py adds a family)"
        )
    torch_dtype = _dtype(dtype if dtype != "auto" else defaults(name).dtype, config)
    torch_device = torch_device if weights else torch.device("meta")
    model, tokenizer = _load(name, source, at_commit, weights, _build_options(family, torch_dtype))
    return LoadedModel(
        model=model.to(torch_device).eval().requires_grad_(False),  # pyright: ignore[reportArgumentType]
        tokenizer=tokenizer,
        name=_lasting_name(name),
        revision=commit or _folder_sha256(Path(source)),
        family=family,
        n_layers=model.config.num_hidden_layers,
        d_model=model.config.hidden_size,
        device=torch_device,
        dtype=torch_dtype,
    )


def hf_name(loaded: LoadedModel, hook_point: HookPoint) -> str:
    """The module that is hooked, e.g. `model.layers.12`; `.input` is added when it is what goes into the module."""
    _check_layer(loaded, hook_point)
    family = FAMILIES[loaded.family]
    layer = f"{family.layers}.{hook_point.layer}"
    return {
        "resid_post": layer,
        "resid_pre": f"{layer}.input",
        "attn_out": f"{layer}.{family.attn_out}",
        "mlp_out": f"{layer}.{family.mlp_out}",
    }[hook_point.site]


def activations(loaded: LoadedModel, tokens: Tensor, hook_points: Sequence[HookPoint]) -> dict[HookPoint, Tensor]:
    """tokens [batch, window] -> the activation at each hook point [batch, window, d_model].

    The model runs no further than the last wanted layer, so the final norm has no part in it: these are the bits
    that a forward hook on the whole model sees. Raises UserError for a layer that the model does not have.
    """
    found: dict[HookPoint, Tensor] = {}
    last = max(hook_points, key=lambda point: point.layer)
    with contextlib.ExitStack() as hooks:
        for point in hook_points:
            hooks.enter_context(_hooked(loaded, point, _recorder(found, point)))
        # Registered after the others on the same layer, so it runs after them.
        hooks.enter_context(_hooked(loaded, HookPoint("resid_post", last.layer), _stop))
        with torch.no_grad(), contextlib.suppress(_Done):
            loaded.model.base_model(input_ids=tokens.to(loaded.device), use_cache=False)
    return found


def spliced_logits(
    loaded: LoadedModel, tokens: Tensor, hook_point: HookPoint, replace: Callable[[Tensor], Tensor]
) -> Tensor:
    """tokens [batch, window] -> logits [batch, window, vocab] of the whole model with one activation replaced.

    `replace` maps the activation at the hook point, [batch, window, d_model], to one of the same shape.
    """

    def swap(activation: Tensor) -> Tensor:
        return replace(activation).to(activation.dtype)

    with _hooked(loaded, hook_point, swap):
        return logits(loaded, tokens)


def logits(loaded: LoadedModel, tokens: Tensor) -> Tensor:
    """tokens [batch, window] -> logits [batch, window, vocab]."""
    with torch.no_grad():
        return loaded.model(input_ids=tokens.to(loaded.device), use_cache=False).logits


class _Done(Exception):
    """Leaves the forward pass once the last wanted layer has run."""


def _stop(_: Tensor) -> None:
    raise _Done


def _recorder(found: dict[HookPoint, Tensor], point: HookPoint) -> Callable[[Tensor], None]:
    def record(activation: Tensor) -> None:
        found[point] = activation

    return record


@contextlib.contextmanager
def _hooked(loaded: LoadedModel, point: HookPoint, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """While inside, `see` gets the activation at the hook point; what it returns, if anything, takes its place."""
    path = hf_name(loaded, point)

    def on_output(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        if isinstance(output, tuple):  # attention returns its weights too
            new = see(output[0])
            return None if new is None else (new, *output[1:])
        return see(output)

    def on_input(module: nn.Module, inputs: tuple) -> tuple | None:
        new = see(inputs[0])
        return None if new is None else (new, *inputs[1:])

    if path.endswith(".input"):
        handle = loaded.model.get_submodule(path.removesuffix(".input")).register_forward_pre_hook(on_input)
    else:
        handle = loaded.model.get_submodule(path).register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def _check_layer(loaded: LoadedModel, point: HookPoint) -> None:
    if not 0 <= point.layer < loaded.n_layers:
        raise UserError(
            f"{loaded.name} has {loaded.n_layers} layers, numbered 0 to {loaded.n_layers - 1}; "
            f"there is no layer {point.layer}"
        )


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch says "not compiled with CUDA" by an AssertionError
        raise UserError(f"there is no device '{text}' here; use cpu, or cuda on a machine with a GPU") from error
    return device


def _dtype(text: str, config: dict) -> torch.dtype:
    if text == "auto":
        saved = config.get("dtype") or config.get("torch_dtype")
        text = "bfloat16" if saved == "bfloat16" else "float32"
    if text not in DTYPES:
        raise UserError(f"'{text}' is not a dtype for the model; use auto, {', '.join(DTYPES)}")
    return DTYPES[text]


def _locate(name: str) -> tuple[str, str]:
    """(folder or hub id, the hub's commit or "" for a folder)."""
    source = defaults(name).source
    if source and Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise UserError(f"the folder {source} has no config.json; give one that save_pretrained wrote")
        return source, ""
    known = f"short names: {', '.join(SHORT_NAMES)}; or give a hub id (owner/name) or a folder"
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", source):
        raise UserError(f"there is no model '{name}' ({known})")
    repo, _, revision = source.partition("@")
    try:
        config = _downloaded(repo, revision or None)
    except GatedRepoError as error:
        raise UserError(
            f"'{repo}' is gated: accept its licence at https://huggingface.co/{repo}, then `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"'{source}' is no folder here, and the Hugging Face hub cannot be reached to look for it ({known})"
        ) from error
    except (HFValidationError, RepositoryNotFoundError, EntryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(f"the Hugging Face hub has no model '{source}' ({known})") from error
    except HfHubHTTPError as error:
        raise UserError(f"the Hugging Face hub answered for '{repo}': {error}; try again later") from error
    return repo, config.parent.name  # .../snapshots/<commit>/config.json


def _downloaded(repo: str, revision: str | None) -> Path:
    """The model's config.json; a model downloaded before is used as it is, with no look at the network."""
    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return Path(hf_hub_download(repo, "config.json", revision=revision))


def _build_options(family: str, dtype: torch.dtype) -> dict[str, Any]:
    attention = FAMILIES[family].attention
    return {"dtype": dtype} | ({"attn_implementation": attention} if attention else {})


def _load(
    name: str, source: str, at_commit: dict[str, str], weights: bool, build: dict[str, Any]
) -> tuple[PreTrainedModel, Tokenizer]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **at_commit)
        if not weights:
            with torch.device("meta"):
                config = AutoConfig.from_pretrained(source, **at_commit)
                return AutoModelForCausalLM.from_config(config, **build), tokenizer
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **at_commit, **build)
        model, report = loaded  # a pair, because the report is asked for
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"'{name}' cannot be loaded: {reason}") from error
    if n_bad := len(report["missing_keys"]) + len(report["mismatched_keys"]):
        raise UserError(
            f"'{name}' lacks weights for {n_bad} of the model's tensors, so they would stay random; get the whole model"
        )
    return model, tokenizer


def _lasting_name(name: str) -> str:
    """A name that loads the same model from another working directory; the hub id of a short name."""
    source = defaults(name).source
    if not Path(source).is_dir():
        return source
    return name if name in SHORT_NAMES else str(Path(source).resolve())


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"
