"""The proof, on a short random text, that a model of a family nobody has tested is what granary takes it for."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cache_spec.errors import UserError
from cache_spec.seeds import derive_seed
from harvest.architecture import ADD_A_ROW, Family
from harvest.reader import add_hook, cut_model

# What a layer's attention and MLP, or the norms after them, are usually called.
_ATTENTION_NORMS = ("post_attention_layernorm", "post_self_attn_layernorm")
_ATTENTION = (*_ATTENTION_NORMS, "self_attn", "self_attention", "attention", "attn")
_MLP_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")
_MLP = (*_MLP_NORMS, "mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")
_SHAPE = 2, 8  # windows and tokens of the random text


def proven_places(model: PreTrainedModel, places: Family, name: str) -> Family:
    """The places, with `attn_out` and `mlp_out` where they were found.

    Raises UserError unless the layers run once each, in order, from left to right, and the model cut after the first,
    the middle and the last of them gives, bit for bit, what a hook on the whole model sees.
    """
    generator = torch.Generator().manual_seed(derive_seed("harvest/probe"))
    config = model.config.get_text_config()
    tokens = torch.randint(config.vocab_size, _SHAPE, generator=generator).to(model.device)
    n_layers, shape = config.num_hidden_layers, (*_SHAPE, config.hidden_size)
    layers = [f"{places.layers}.{i}" for i in range(n_layers)]
    seen = _watch(model, tokens, [*layers, *(f"{layer}.input" for layer in layers)], copied=True)
    if [len(seen[layer]) for layer in layers] != [1] * n_layers or seen[layers[-1]][0].shape != shape:
        raise _refusal(model, places, name, "they do not run once each and give [batch, window, d_model]")
    post = [seen[layer][0] for layer in layers]
    _refuse_if_not_causal(model, tokens, layers[-1], post[-1], name)
    for last in sorted({0, n_layers // 2, n_layers - 1}):
        with torch.no_grad():
            cut = cut_model(model, places, last)[0].base_model(input_ids=tokens, use_cache=False)[0]
        if not torch.equal(cut, post[last]):
            raise _refusal(model, places, name, f"the model cut after layer {last} does not end with what it gives")
    as_read = _watch(model, tokens, layers, copied=False)  # a later module may write over what was read
    if not all(torch.equal(as_read[layer][0], output) for layer, output in zip(layers, post, strict=True)):
        raise _refusal(model, places, name, "later layers write over what they give")
    pre = [seen[f"{layer}.input"][0] for layer in layers]
    attn_out, mlp_out = _find_sites(model, tokens, layers, pre, post)
    return replace(places, attn_out=attn_out, mlp_out=mlp_out)


def _watch(model: PreTrainedModel, tokens: Tensor, paths: Iterable[str], *, copied: bool) -> dict[str, list[Tensor]]:
    """What passes each hook point while the whole model runs, call by call."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    with ExitStack() as hooks, torch.no_grad():
        for path, calls in seen.items():

            def keep(activation: Tensor, calls: list[Tensor] = calls) -> None:
                calls.append(activation.clone() if copied else activation)

            hooks.callback(add_hook(model.get_submodule, path, keep).remove)
        model.base_model(input_ids=tokens, use_cache=False)
    return seen


def _refuse_if_not_causal(model: PreTrainedModel, tokens: Tensor, layer: str, before: Tensor, name: str) -> None:
    """Another last token must not change what earlier positions hold; rounding may."""
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % model.config.get_text_config().vocab_size
    after = _watch(model, other, [layer], copied=True)[layer][0]
    tolerance = min(64 * torch.finfo(before.dtype).eps, 0.02) * before.abs().max()
    if (after - before)[:, :-1].abs().max() > tolerance:
        raise UserError(
            f"'{name}' is a {model.config.model_type} model and reads its text in both directions; granary reads "
            "causal models, from left to right"
        )


def _find_sites(
    model: PreTrainedModel, tokens: Tensor, layers: list[str], pre: list[Tensor], post: list[Tensor]
) -> tuple[str, str]:
    """The children of every layer whose outputs add up to what it adds to the residual stream; empty if none do."""
    names = [name for name in (*_ATTENTION, *_MLP) if all(_has(model.get_submodule(layer), name) for layer in layers)]
    seen = _watch(model, tokens, [f"{layer}.{name}" for layer in layers for name in names], copied=False)
    for attn_out in filter(names.__contains__, _ATTENTION):
        for mlp_out in filter(names.__contains__, _MLP):
            parts = [(seen[f"{layer}.{attn_out}"], seen[f"{layer}.{mlp_out}"]) for layer in layers]
            if all(map(_adds_up, pre, post, parts)):
                return attn_out, mlp_out
    return "", ""


def _has(layer: nn.Module, name: str) -> bool:
    return name in dict(layer.named_children())


def _adds_up(before: Tensor, after: Tensor, parts: tuple[list[Tensor], list[Tensor]]) -> bool:
    """Whether what is missing is small beside either part, in most positions: a few activations may be so large that
    rounding them hides the rest."""
    if [len(calls) for calls in parts] != [1, 1] or any(calls[0].shape != before.shape for calls in parts):
        return False
    attention, mlp = (calls[0].float() for calls in parts)
    missing = (after.float() - before.float() - attention - mlp).norm(dim=-1)
    return bool((missing <= 0.1 * torch.minimum(attention.norm(dim=-1), mlp.norm(dim=-1))).float().mean() > 0.5)


def _refusal(model: PreTrainedModel, places: Family, name: str, what: str) -> UserError:
    return UserError(
        f"'{name}' is a {model.config.model_type} model without a row of its own; granary looked for its layers at "
        f"{places.layers} and the norm after them at {places.norm or 'no place'}, but {what}; {ADD_A_ROW}"
    )
