"""What a decoder row says by itself: the tokens it raises and lowers, and the latents whose rows point alike."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_spec.errors import UserError
from harvest.model import LoadedModel, load_model

N_TOKENS = 10
N_NEAREST = 8
_BATCH_VALUES = 2**25


@dataclass(frozen=True, kw_only=True, eq=False)
class Lens:
    """For each latent shown, the tokens raised most and lowered most: ids and logits, [n_latents, N_TOKENS] each."""

    top: np.ndarray
    top_logits: np.ndarray
    bottom: np.ndarray
    bottom_logits: np.ndarray


def load_for_lens(name: str, d_model: int, device: str) -> LoadedModel:
    """The model to look through. Raises UserError if its residual stream has not the width of the decoder rows."""
    loaded = load_model(name, device=device)
    if loaded.d_model != d_model:
        raise UserError(
            f"--model {name} has a residual stream of {loaded.d_model} dimensions, and decoder rows have {d_model}; "
            "give the model that the cache was made with"
        )
    return loaded


@torch.no_grad()
def logit_lens(loaded: LoadedModel, directions: Tensor) -> Lens:
    """Decoder rows [n, d_model] through the model's final norm and unembedding, as if each were the whole stream.

    The norm is the model's own, so its weight counts, and LayerNorm's mean is taken out; what it gives for a zero
    input (its bias) is subtracted, and so is the mean over the vocabulary. A model without a final norm has none.
    """
    norm_name = loaded.places.norm
    norm = loaded.model.get_submodule(norm_name) if norm_name else torch.nn.Identity()
    head = loaded.model.get_output_embeddings()
    if head is None:
        raise UserError(f"{loaded.name} has no unembedding to look through; leave --model out")
    n_tokens = min(N_TOKENS, loaded.vocab_size)
    rows = directions.to(loaded.device)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12) * rows.shape[1] ** 0.5  # else the norm's epsilon acts
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for part in rows.split(max(1, _BATCH_VALUES // loaded.vocab_size)):
        part = part.to(loaded.dtype)
        logits = (head(norm(part)) - head(norm(torch.zeros_like(part[:1])))).float()
        logits -= logits.mean(dim=1, keepdim=True)
        top, bottom = logits.topk(n_tokens, dim=1), logits.topk(n_tokens, dim=1, largest=False)
        parts.append((top.indices, top.values, bottom.indices, bottom.values))
    ids, values, low_ids, low_values = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return Lens(top=ids, top_logits=values, bottom=low_ids, bottom_logits=low_values)


@torch.no_grad()
def nearest(directions: Tensor, latents: np.ndarray, n: int = N_NEAREST) -> tuple[np.ndarray, np.ndarray]:
    """For each of some latents, the others with the largest cosine of decoder rows: (latents, cosines) [n_latents, n].

    directions: [d_sae, d_model], all decoder rows. A row of zeros is near to nothing.
    """
    units = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
    n = min(n, len(units) - 1)
    chosen = torch.from_numpy(latents).to(units.device)
    parts: list[tuple[Tensor, Tensor]] = []
    for part in chosen.split(max(1, _BATCH_VALUES // len(units))):
        cosines = units[part] @ units.T
        cosines[torch.arange(len(part), device=part.device), part] = -torch.inf
        best = cosines.topk(n, dim=1)
        parts.append((best.indices, best.values))
    indices, values = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return indices, values
