"""Where a model keeps what is hooked: a row of FAMILIES, or found in the model itself.

A family without a row is found by its shape and proven by `harvest.probe` before it is used; a row saves the proof and
lets a window be read on from another (`Reader.read_after`).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family of models keeps what is hooked; paths from the whole model, the last two from one layer.

    `attn_out` and `mlp_out` are the modules whose output is added to the residual stream; empty if none is known.
    `norm` is what follows the last layer; empty if nothing does.
    """

    layers: str
    norm: str
    attn_out: str
    mlp_out: str


_LLAMA = Family(layers="model.layers", norm="model.norm", attn_out="self_attn", mlp_out="mlp")
_POST_NORM = Family(  # what is added is what the norms after attention and MLP give
    layers="model.layers", norm="model.norm", attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm"
)
_GPT2 = Family(layers="transformer.h", norm="transformer.ln_f", attn_out="attn", mlp_out="mlp")

FAMILIES = {  # by the `model_type` in a model's config.json; the tests prove each row on a small random model
    "gpt_neox": Family(layers="gpt_neox.layers", norm="gpt_neox.final_layer_norm", attn_out="attention", mlp_out="mlp"),
    "phi": Family(layers="model.layers", norm="model.final_layernorm", attn_out="self_attn", mlp_out="mlp"),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj"), _GPT2),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3"), _POST_NORM),
    **dict.fromkeys(("cohere2", "gemma", "gpt_oss", "granite", "llama", "mistral", "mixtral", "olmo", "phi3"), _LLAMA),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"), _LLAMA),
}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A causal language model that is ready to run: evaluation mode, no gradients."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str  # loads the same model again: a short name, a hub id or the absolute path of a folder
    revision: str  # the hub's commit, or "sha256:..." over a folder's config and weights
    family: str
    places: Family
    n_layers: int
    d_model: int
    vocab_size: int
    special_ids: tuple[int, ...]
    max_tokens: int | None  # the longest text it can read, if there is such a limit
    device: torch.device  # where it runs; its weights may wait on the host until `release_rest`
    dtype: torch.dtype
    is_whole: bool = True  # whether it has all its layers and its head


def hf_name(loaded: LoadedModel, hook_point: HookPoint) -> str:
    """The module that is hooked, e.g. `model.layers.12`; `.input` is added when it is what goes into the module.

    Raises UserError for a layer that the model does not have and a site that is not known in its family.
    """
    if not 0 <= hook_point.layer < loaded.n_layers:
        raise UserError(
            f"{loaded.name} has {loaded.n_layers} layers, numbered 0 to {loaded.n_layers - 1}; "
            f"there is no layer {hook_point.layer}"
        )
    places = loaded.places
    layer = f"{places.layers}.{hook_point.layer}"
    if hook_point.site == "resid_post":
        return layer
    if hook_point.site == "resid_pre":
        return f"{layer}.input"
    module = {"attn_out": places.attn_out, "mlp_out": places.mlp_out}[hook_point.site]
    if not module:
        raise UserError(
            f"in {loaded.family} models no module was found whose output is {hook_point.site}; take resid_pre or "
            f"resid_post, or add a row for '{loaded.family}' to FAMILIES in harvest/architecture.py"
        )
    return f"{layer}.{module}"


def find_places(model: PreTrainedModel, name: str) -> Family:
    """Where a model of a family without a row has its layers and the norm after them, judged by its shape alone.

    Whether that is right, and which modules are attn_out and mlp_out, only running it tells: `harvest.probe`.
    Raises UserError if there is not exactly one list of `num_hidden_layers` layers.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    lists = [path for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == n_layers]
    lists = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if len(lists) != 1:
        raise UserError(
            f"'{name}' is a {model.config.model_type} model, and granary looked in it for one list of {n_layers} "
            f"layers and found {', '.join(lists) or 'none'}; {ADD_A_ROW}"
        )
    parent = lists[0].rpartition(".")[0]
    norms = [part for part, module in model.get_submodule(parent).named_children() if _is_norm(part, module)]
    norms.sort(key=lambda part: "emb" not in part)  # a norm of the embeddings is the last to be thought of
    norm = ".".join(filter(None, [parent, norms[-1]])) if norms else ""
    return Family(layers=lists[0], norm=norm, attn_out="", mlp_out="")


ADD_A_ROW = "one row of FAMILIES in harvest/architecture.py adds a family"


def _is_norm(name: str, module: nn.Module) -> bool:
    return ("norm" in type(module).__name__.lower() or "norm" in name) and not isinstance(module, nn.ModuleList)
