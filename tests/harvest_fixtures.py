"""Small random models of every family, saved with a tokenizer, and text for them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from harvest.model import LoadedModel
from harvest.options import Options
from harvest.request import Request, make_request

WORDS = [f"w{i}" for i in range(40)]
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_GATED = {**_SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = ("gpt_neox", "gpt2", "gemma2", "llama", "qwen3")


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token a word. Like the real ones, GPT-NeoX has one token for BOS and EOS, Gemma-2 two, Qwen3 no BOS."""
    special = {
        "gpt_neox": {"bos_token": "<|end|>", "eos_token": "<|end|>"},
        "gpt2": {"bos_token": "<|end|>", "eos_token": "<|end|>"},
        "qwen3": {"eos_token": "<|end|>"},
    }.get(family, {"bos_token": "<bos>", "eos_token": "<eos>"})
    vocabulary = [*dict.fromkeys(special.values()), "<unk>", "...", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def _config(family: str, n_vocab: int) -> PreTrainedConfig:
    ids = {"vocab_size": n_vocab, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    match family:
        case "gpt_neox":
            return GPTNeoXConfig(**_SIZES, **ids, intermediate_size=32)
        case "gpt2":
            return GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=64, initializer_range=0.3, **ids)
        case "gemma2":  # the window is shorter than the text, so that local and global layers differ
            return Gemma2Config(**_GATED, **ids, sliding_window=8, query_pre_attn_scalar=8)
        case "llama":
            return LlamaConfig(**_GATED, **ids)
        case "qwen3":
            return Qwen3Config(**_GATED, **ids)
    raise AssertionError(family)


def save_model(folder: Path, family: str = "gpt_neox", dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model and its tokenizer; the weights depend on the family alone."""
    tokenizer = make_tokenizer(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_config(family, len(tokenizer)))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_documents(n: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of 1 to `longest` words."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(rng.integers(1, longest + 1, size=n))
    words = [WORDS[i] for i in rng.integers(0, len(WORDS), size=ends[-1])]
    return [" ".join(words[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def write_text(path: Path, n_documents: int, seed: int = 0) -> Path:
    """A .txt with blank lines between the documents."""
    path.write_text("\n\n".join(random_documents(n_documents, seed)) + "\n")
    return path


def options(**changes) -> Options:
    """The command's options with a small harvest in mind; probabilities and scale factors may be numbers."""
    small = Options(layers="1", tokens="6144", context=32, held_out=0.2)
    numbers = ("mask_prob", "random_prob", "scale_factor")
    texts = {name: str(value) for name, value in changes.items() if name in numbers}
    return replace(small, **{**changes, **texts})


def request_for(loaded: LoadedModel, text: Path | str, **changes) -> Request:
    """What `python -m harvest` would ask for."""
    return make_request(loaded, loaded.name, options(dataset=str(text), **changes))
