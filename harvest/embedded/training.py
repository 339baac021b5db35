"""Trains the embedded language model: a stock GPT-NeoX with frozen random input embeddings.

Frozen N(0, 1) embeddings give every word a fixed code without any structure. What the words have in common (their
letter, their kind) must then be computed by the layers, and identity keeps a large share of the variance. With
learned embeddings the model drops identities it rarely needs, and SAEs show no absorption.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from cache_spec.progress import Progress
from cache_spec.seeds import derive_seed
from harvest.embedded import vocabulary as words
from harvest.embedded.corpus import WINDOW_TOKENS, generate

D_MODEL, N_LAYERS, N_HEADS = 96, 3, 4
BATCH_DOCUMENTS = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
CLIP_NORM = 1.0


def new_model(seed: int) -> GPTNeoXForCausalLM:
    """An untrained model whose weights depend on `seed` alone."""
    config = GPTNeoXConfig(
        vocab_size=len(words.VOCABULARY),
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        intermediate_size=4 * D_MODEL,
        max_position_embeddings=WINDOW_TOKENS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=words.TOKEN_ID[words.BOS],
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator; its draws are replaced
        model = GPTNeoXForCausalLM(config)
    generator = torch.Generator().manual_seed(derive_seed("embedded/init", seed))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.02, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)
        codes = torch.Generator().manual_seed(derive_seed("embedded/codes", seed))
        input_embeddings(model).normal_(0.0, 1.0, generator=codes)
        input_embeddings(model).requires_grad_(False)
    return model


def input_embeddings(model: GPTNeoXForCausalLM) -> torch.nn.Parameter:
    """The code of every word: [vocabulary, d_model]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.nn.Parameter)
    return weight


def training_tokens(n_documents: int, seed: int) -> torch.Tensor:
    """Half the documents in distribution, half shifted, in turns: [n_documents, 64]."""
    n_half = (n_documents + 1) // 2
    halves = [generate(n_half, derive_seed("embedded/train", seed), shifted).tokens for shifted in (False, True)]
    return torch.from_numpy(np.stack(halves, axis=1).reshape(-1, WINDOW_TOKENS)[:n_documents])


def learning_rate(step: int, n_steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth at the last step."""
    warmup = min(WARMUP_STEPS, max(1, n_steps // 10))
    if step < warmup:
        return LEARNING_RATE * (step + 1) / warmup
    done = (step - warmup) / max(1, n_steps - warmup)
    return LEARNING_RATE * (0.1 + 0.45 * (1.0 + math.cos(math.pi * done)))


def _batches(tokens: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Batches without end, the documents in a new order each time round."""
    generator = torch.Generator().manual_seed(derive_seed("embedded/order", seed))
    while True:
        order = torch.randperm(len(tokens), generator=generator)
        for start in range(0, len(tokens) - BATCH_DOCUMENTS + 1, BATCH_DOCUMENTS):
            yield tokens[order[start : start + BATCH_DOCUMENTS]]


def token_losses(model: GPTNeoXForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of every token after the first: [n_documents, 64] -> [n_documents, 63]."""
    logits = model(input_ids=tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def train(model: GPTNeoXForCausalLM, tokens: torch.Tensor, n_steps: int, seed: int) -> list[float]:
    """Train in place; returns the loss of every step. The same on the same machine with the same threads."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    batches = _batches(tokens, seed)
    model.train()
    with Progress("train", n_steps, "steps") as progress:
        for step in range(n_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, n_steps)
            loss = token_losses(model, next(batches)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
            optimizer.step()
            losses.append(loss.item())
            progress.advance(note=f"loss {losses[-1]:.3f}")
    model.eval()
    return losses
