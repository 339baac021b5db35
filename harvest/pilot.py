"""A few batches before the harvest: how large the activations get, and how fast the model is here."""

import math
import statistics
import time

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from cache_spec.layout import FP16_MAX
from cache_spec.plan import Plan
from cache_spec.seeds import derive_seed
from harvest.masking import window_inputs
from harvest.reader import Reader
from harvest.windows import Windows

_HEADROOM = 4.0  # the pilot sees a small part of the text
_LEAST_STORED = 1.0  # the largest value, as stored; fp16 rounds values below 6e-5 more and more coarsely
_PILOT_TOKENS, _TOKENS_AT_ONCE = 4096, 1024  # of each variant
_SPEED_BATCHES, _SPEED_SECONDS = 5, 1.5  # whichever is first; one batch at least


def largest_activations(reader: Reader, tokenizer: Tokenizer, plan: Plan, windows: Windows) -> dict[HookPoint, float]:
    """The largest absolute activation at each hook point over a few thousand tokens of every variant.

    Raises UserError, with the hook point and what to do, if one is infinite or NaN.
    """
    absmax = dict.fromkeys(reader.hook_points, 0.0)
    n_windows, step = (max(1, n // plan.window_tokens) for n in (_PILOT_TOKENS, _TOKENS_AT_ONCE))
    for first in range(0, min(n_windows, len(windows.tokens)), step):
        tokens = np.asarray(windows.tokens[first : min(first + step, n_windows)])
        numbers = first + np.arange(len(tokens))
        inputs, _ = window_inputs(tokenizer, plan.variants, plan.seed, numbers, tokens)
        batch = torch.from_numpy(inputs.reshape(-1, plan.window_tokens).astype(np.int64))
        for point, activation in _read(reader, batch).items():
            largest = float(activation.abs().max())  # NaN if one is
            if not math.isfinite(largest):
                raise UserError(
                    f"{plan.model['id']} gives infinite or NaN activations at {point}; {remedy(plan.model['dtype'])}"
                )
            absmax[point] = max(absmax[point], largest)
    return absmax


def remedy(dtype: str) -> str:
    """What to do about infinite or NaN activations of a model in this dtype: the flag to use."""
    wider = {"float16": "try --dtype bfloat16 or --dtype float32", "bfloat16": "try --dtype float32"}
    return wider.get(dtype, "the widest --dtype does not hold them, so leave this hook point out of --layers")


def scale_for(absmax: float) -> float:
    """The smallest power of two, from 1, that leaves fp16 a headroom of 4 above `absmax`."""
    return 2.0 ** max(0, math.ceil(math.log2(max(absmax, 1.0) * _HEADROOM / FP16_MAX)))


def check_scales(scale_factors: dict[HookPoint, float], absmax: dict[HookPoint, float]) -> None:
    """Raises UserError if the pilot's activations, divided by the scale factor asked for (0: none was), are beyond
    fp16, or so small that fp16 would hold little of them."""
    for point, largest in absmax.items():
        scale = scale_factors[point]
        fits = f"give {point}={scale_for(largest):g}, or 0 to have one found"
        if scale and largest / scale > FP16_MAX:
            raise UserError(
                f"activations reach {largest:,.0f} at {point}, and fp16 ends at {FP16_MAX:,.0f}: --scale-factor "
                f"{scale:g} is too small, {fits}"
            )
        if scale > 1 and largest / scale < _LEAST_STORED:
            raise UserError(
                f"activations reach {largest:,.4g} at {point} in a pilot run, and --scale-factor {scale:g} would store "
                f"{largest / scale:.2g} of that, where fp16 loses the small ones; {fits}"
            )


def model_speed(reader: Reader, plan: Plan, batch_windows: int) -> float:
    """Tokens a second, of all variants together, that the model reads in batches of `batch_windows` windows.

    The tokens are random. After one batch to warm up it is the median of a few.
    """
    generator = torch.Generator().manual_seed(derive_seed("harvest/speed"))
    shape = (batch_windows * len(plan.variants), plan.window_tokens)
    tokens = torch.randint(plan.model["vocab_size"], shape, generator=generator)
    _timed(reader, tokens)
    seconds = [_timed(reader, tokens)]
    while len(seconds) < _SPEED_BATCHES and sum(seconds) < _SPEED_SECONDS:
        seconds.append(_timed(reader, tokens))
    return tokens.numel() / statistics.median(seconds)


def _timed(reader: Reader, tokens: torch.Tensor) -> float:
    start = time.perf_counter()
    for activation in _read(reader, tokens).values():
        activation.flatten()[-1].item()  # waits for the device, whichever it is
    return time.perf_counter() - start


def _read(reader: Reader, tokens: torch.Tensor) -> dict[HookPoint, torch.Tensor]:
    try:
        with torch.inference_mode():
            return reader.read(tokens)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a batch of {tokens.shape[0]} x {tokens.shape[1]} tokens does not fit on {reader.device}; "
            "give a smaller --batch-windows or --context"
        ) from error
