"""The model: loaded from a short name, a hub id or a folder, and read or changed at its hook points.

Where the parts of a family are is told in harvest/architecture.py, what a name leads to in harvest/locate.py.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from harvest.architecture import FAMILIES, LoadedModel, find_places, hf_name
from harvest.locate import SHORT_NAMES, ShortName, defaults, lasting_name, locate
from harvest.masking import special_ids
from harvest.probe import proven_places
from harvest.reader import add_hook, move, open_reader, release_rest

__all__ = [
    "FAMILIES",
    "SHORT_NAMES",
    "LoadedModel",
    "ShortName",
    "activations",
    "defaults",
    "hf_name",
    "load_model",
    "logits",
    "release_rest",
    "spliced_logits",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("sdpa", "eager", "flash_attention_2")


def load_model(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    attention: str = "auto",
    weights: bool = True,
    wait: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer; code that comes with a model is never run.

    `name` is one of SHORT_NAMES, a hub id (`owner/name`, or `owner/name@revision`) or a folder that
    `save_pretrained` wrote. `dtype` auto is bfloat16 for a checkpoint in bfloat16 and float32 for any other: small
    models released in float16 lose accuracy when run in it. `attention` auto is what transformers chooses for the
    family, and eager where scores are capped. With `wait` the weights stay on the host until `release_rest` has
    dropped those that are not needed.

    Raises UserError for a name that leads to no model, a gated model, a model that is not causal or whose layers are
    not found, weights that do not fill the model, and a device, dtype or attention that cannot be had.
    """
    logging.disable_progress_bar()  # it is about reading a file; the commands show their own progress
    torch_device = _device(device) if weights else torch.device("meta")
    folder, revision = locate(name, weights=weights)
    config = _read_config(name, folder)
    torch_dtype = _dtype(dtype if dtype != "auto" else defaults(name).dtype, config)
    _check_attention(attention, torch_dtype, device)
    tokenizer = _load_tokenizer(name, folder)
    build = {"dtype": torch_dtype} | _attention_option(name, folder, attention)
    model = _load_weights(name, folder, build) if weights else _outline(name, folder, build)
    if not wait:
        move(model, torch_device, name)
    model.eval().requires_grad_(False)
    family, text = config["model_type"], model.config.get_text_config()
    places = FAMILIES.get(family)
    if places is None:
        places = find_places(model, name)
        places = proven_places(model, places, name) if weights else places
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=lasting_name(name),
        revision=revision,
        family=family,
        places=places,
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        vocab_size=text.vocab_size,
        special_ids=special_ids(tokenizer),
        max_tokens=getattr(text, "max_position_embeddings", None),
        device=torch_device,
        dtype=torch_dtype,
    )


def activations(loaded: LoadedModel, tokens: Tensor, hook_points: Sequence[HookPoint]) -> dict[HookPoint, Tensor]:
    """tokens [batch, window] -> the activation at each hook point [batch, window, d_model]; see `Reader.read`.

    For more than a few batches, `open_reader` cuts the model once. Raises UserError for a layer that the model does
    not have.
    """
    with open_reader(loaded, hook_points) as reader:
        return reader.read(tokens)


def spliced_logits(
    loaded: LoadedModel, tokens: Tensor, hook_point: HookPoint, replace: Callable[[Tensor], Tensor]
) -> Tensor:
    """tokens [batch, window] -> logits [batch, window, vocab] of the whole model with one activation replaced.

    `replace` maps the activation at the hook point, [batch, window, d_model], to one of the same shape.
    """

    def swap(activation: Tensor) -> Tensor:
        return replace(activation).to(activation.dtype)

    handle = add_hook(loaded.model.get_submodule, hf_name(loaded, hook_point), swap)
    try:
        return logits(loaded, tokens)
    finally:
        handle.remove()


def logits(loaded: LoadedModel, tokens: Tensor) -> Tensor:
    """tokens [batch, window] -> logits [batch, window, vocab]."""
    assert loaded.is_whole, "release_rest has dropped the layers that logits need"
    with torch.no_grad():
        return loaded.model(input_ids=tokens.to(loaded.device), use_cache=False).logits


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


def _check_attention(attention: str, dtype: torch.dtype, device: str) -> None:
    if attention not in ("auto", *ATTENTION):
        raise UserError(f"'{attention}' is no way to compute attention; use auto, {', '.join(ATTENTION)}")
    if attention == "flash_attention_2" and (dtype == torch.float32 or not device.startswith("cuda")):
        raise UserError(
            "flash_attention_2 needs --device cuda and --dtype bfloat16 or float16; here they are "
            f"{device} and {str(dtype).removeprefix('torch.')}"
        )


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    """config.json of a model that transformers can run by itself, from left to right."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"'{name}' has a config.json that is no JSON: {_first_line(error)}") from error
    family = config.get("model_type", "")
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if config.get("auto_map"):
            raise UserError(
                f"'{name}' needs code that comes with it ('auto_map' in its config.json), and granary never runs such "
                "code; give a model that transformers can run by itself"
            )
        raise UserError(
            f"'{name}' is a {family or 'nameless'} model, and transformers {transformers.__version__} knows no causal "
            "language model of that name; give one that AutoModelForCausalLM loads"
        )
    if config.get("is_encoder_decoder"):
        raise UserError(f"'{name}' is an encoder and a decoder ({family}); granary reads decoder-only causal models")
    return config


def _attention_option(name: str, folder: Path, attention: str) -> dict[str, str]:
    """What to tell transformers; nothing where its own choice is right.

    Some releases of it give a model that caps its attention scores (Gemma-2) to sdpa, which leaves the cap out.
    """
    with _loading(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        if attention == "sdpa":
            raise UserError(
                f"'{name}' caps its attention scores, and sdpa would leave the cap out; use auto, eager or "
                "flash_attention_2"
            )
        attention = "eager" if attention == "auto" else attention
    return {} if attention == "auto" else {"attn_implementation": attention}


def _load_weights(name: str, folder: Path, build: dict[str, Any]) -> PreTrainedModel:
    with _loading(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **build,
        )
    model, report = loaded  # a pair, because the report is asked for
    if n_bad := len(report["missing_keys"]) + len(report["mismatched_keys"]):
        raise UserError(
            f"'{name}' lacks weights for {n_bad} of the model's tensors, so they would stay random; get the whole model"
        )
    return model


def _outline(name: str, folder: Path, build: dict[str, Any]) -> PreTrainedModel:
    with torch.device("meta"), _loading(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, **build)


def _load_tokenizer(name: str, folder: Path) -> Tokenizer:
    with _loading(name, "the tokenizer of "):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextlib.contextmanager
def _loading(name: str, what: str = "") -> Iterator[None]:
    """Give what transformers says about a file or a missing package in one sentence."""
    loudness = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print a table of missing weights above our sentence
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{what}'{name}' cannot be loaded: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(loudness)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
