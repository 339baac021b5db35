"""Small random models, built in process without files."""

import torch
from harvest_fixtures import FAMILIES as SAVED
from harvest_fixtures import _config, make_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cache_spec import HookPoint
from harvest.architecture import FAMILIES, LoadedModel, find_places
from harvest.probe import proven_places

N_VOCAB, N_LAYERS, D_MODEL = 64, 3, 16
_IDS = {"vocab_size": N_VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64, "initializer_range": 0.3, **_IDS}
_BASIC = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    **_IDS,
}
_SIZES = {  # for families whose config has words of its own
    "bert": {**_BASIC, "intermediate_size": 32},
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 2, "initializer_range": 0.3, **_IDS},
    "codegen": {**_GPT2, "n_head": 4, "rotary_dim": 4, "n_ctx": 64},
    "falcon": _BASIC,
    "gpt_neo": {
        **_IDS,
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 2,
        "attention_types": [[["global"], 3]],
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    },
    "gptj": {**_GPT2, "rotary_dim": 4},
    "mamba": {**_BASIC, "state_size": 4},
    "opt": {**_BASIC, "ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.3, "pad_token_id": 1},
}


def tiny_config(family: str, **changes) -> PreTrainedConfig:
    """3 layers of width 16."""
    if family in SAVED and not changes:
        return _config(family, N_VOCAB)
    usual = {**_BASIC, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
    return CONFIG_MAPPING[family](**{**_SIZES.get(family, usual), **changes})


def tiny_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Weights that depend on the config alone; large ones, so that every part of the model is seen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)


def tiny_loaded(family: str, model: PreTrainedModel | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """As `load_model` gives it."""
    model = tiny_model(tiny_config(family), dtype) if model is None else model
    return LoadedModel(
        special_ids=(),
        model=model,
        tokenizer=make_tokenizer(family),
        name=family,
        revision="",
        family=family,
        places=FAMILIES.get(family) or proven_places(model, find_places(model, family), family),
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        vocab_size=N_VOCAB,
        max_tokens=64,
        device=model.device,
        dtype=model.dtype,
    )


def random_tokens(n_windows: int = 4, window: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, N_VOCAB, (n_windows, window), generator=torch.Generator().manual_seed(seed))


def on_the_whole_model(model: PreTrainedModel, tokens: torch.Tensor, path: str) -> torch.Tensor:
    """What a plain forward hook sees while the whole model runs; `.input`: what goes into the module."""
    seen = []
    if path.endswith(".input"):
        module = model.get_submodule(path.removesuffix(".input"))
        handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    else:
        handle = model.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def every_point(n_layers: int = N_LAYERS, sites: tuple[str, ...] = ("resid_post", "resid_pre", "mlp_out", "attn_out")):
    return [HookPoint(site, layer) for layer in range(n_layers) for site in sites]
