"""Splicing: how much worse the model predicts when its activation is replaced by a reconstruction."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cache_spec.hook_point import HookPoint
from evaluate.rows import Rows
from harvest.model import LoadedModel, activations, logits, spliced_logits

BATCH_WINDOWS = 16
MAX_LOGIT_BYTES = 2**30  # clean log-probabilities are kept, to compare every run with them


@dataclass(frozen=True, kw_only=True, eq=False)
class Splice:
    """A model and fixed test windows.

    tokens: [n_windows, window]. replaced: bool [n_windows, window], the positions whose activation is replaced (special
    tokens keep theirs). rows: those positions' clean activations, in the order of `replaced`.
    """

    loaded: LoadedModel
    hook_point: HookPoint
    tokens: Tensor
    replaced: Tensor
    rows: Rows

    @cached_property
    def clean_log_probs(self) -> list[Tensor]:
        """log p(token | before) of the untouched model, [batch, window, vocab] per batch."""
        return [logits(self.loaded, tokens).float().log_softmax(-1) for tokens in self.tokens.split(BATCH_WINDOWS)]

    @cached_property
    def ablated(self) -> tuple[float, float]:
        """(cross-entropy, KL from the clean model) with every replaced activation set to zero."""
        return self.loss(torch.zeros_like(self.rows.x))

    @cached_property
    def clean_loss(self) -> float:
        """Cross-entropy of the untouched model on the test windows, nats per token."""
        batches = zip(self.clean_log_probs, self.tokens.split(BATCH_WINDOWS), strict=True)
        return sum(_cross_entropy(log_probs, tokens) for log_probs, tokens in batches) / self._n_predicted

    @property
    def _n_predicted(self) -> int:
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)

    def loss(self, reconstruction: Tensor) -> tuple[float, float]:
        """[n_replaced, d_model] -> (cross-entropy, KL(clean || spliced)), nats per predicted token."""
        start, cross_entropy, divergence = 0, 0.0, 0.0
        windows = zip(
            self.tokens.split(BATCH_WINDOWS), self.replaced.split(BATCH_WINDOWS), self.clean_log_probs, strict=True
        )
        for tokens, replaced, clean in windows:
            part = reconstruction[start : start + int(replaced.sum())]
            start += len(part)

            def put(activation: Tensor, replaced: Tensor = replaced, part: Tensor = part) -> Tensor:
                changed = activation.clone()
                changed[replaced] = part.to(activation.dtype)
                return changed

            log_probs = spliced_logits(self.loaded, tokens, self.hook_point, put).float().log_softmax(-1)
            cross_entropy += _cross_entropy(log_probs, tokens)
            divergence += float((clean.exp() * (clean - log_probs))[:, :-1].sum())
        return cross_entropy / self._n_predicted, divergence / self._n_predicted


def _cross_entropy(log_probs: Tensor, tokens: Tensor) -> float:
    targets = tokens[:, 1:].to(log_probs.device)
    return float(-log_probs[:, :-1].gather(-1, targets.unsqueeze(-1)).sum())


def model_rows(loaded: LoadedModel, hook_point: HookPoint, tokens: Tensor, keep: Tensor) -> Tensor:
    """The activations at the kept positions of [n_windows, window] tokens: [n_kept, d_model] float32."""
    pieces = [
        activations(loaded, window, [hook_point])[hook_point][kept.to(loaded.device)].float()
        for window, kept in zip(tokens.split(64), keep.split(64), strict=True)
    ]
    return torch.cat(pieces)
