"""Windows of tokens: whole test windows to run the model on, and their activations, kept once made."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_spec import ActivationCache
from cache_spec.hook_point import HookPoint
from cache_spec.layout import INTERNAL, planner_files
from cache_spec.seeds import derive_seed
from evaluate.kept import code_hash
from evaluate.rows import Rows
from evaluate.splicing import MAX_LOGIT_BYTES, Splice, model_rows
from evaluate.store import Store
from harvest import embedded
from harvest.model import LoadedModel

N_SPLICE_WINDOWS = 200
MAX_SHIFTED_ROWS = 20000


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Whole test windows: tokens [n_windows, window] and, if known, features, bool [n_windows, window, n_features]."""

    tokens: np.ndarray
    features: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A model at a hook point, and where its activations are kept."""

    loaded: LoadedModel
    hook_point: HookPoint
    store: Store

    def rows(self, purpose: str, tokens: np.ndarray, keep: np.ndarray) -> Tensor:
        """Activations [n_kept, d_model] float32 at the kept positions of [n_windows, window] tokens."""
        facts = {
            "revision": self.loaded.revision,
            "hook_point": str(self.hook_point),
            "dtype": str(self.loaded.dtype),
            "device": self.loaded.device.type,
            "threads": torch.get_num_threads(),  # sums are rounded by their number
            "code": code_hash(("harvest",)),
            "tokens": _digest(tokens),
            "keep": _digest(keep),
        }
        made = self.store.get(
            purpose,
            facts,
            lambda: {
                "x": model_rows(
                    self.loaded, self.hook_point, torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(keep)
                )
            },
        )
        return made["x"].to(self.loaded.device)


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def generated_windows(seed: int, part: str) -> Windows:
    """The first windows of the generated text "test" or "shifted" of this seed, whole."""
    corpus = embedded.generate(N_SPLICE_WINDOWS, derive_seed("evaluate/text", seed, part), part == "shifted")
    features, _ = embedded.ground_truth_features(corpus)
    return Windows(tokens=corpus.tokens, features=features.reshape(*corpus.tokens.shape, -1))


def held_out_windows(cache: ActivationCache) -> tuple[Windows | None, str]:
    """Held-out windows of the cache, as many as the log-probabilities have room for; or None and the reason."""
    plan = cache.plan
    n = max(1, min(plan.n_held_out_windows, most_windows(cache)))
    file = f"{INTERNAL}/windows.npy"
    with suppress(FileNotFoundError):
        cache.files.gather([name for name in planner_files(plan) if name == file])
    path = cache.path / file
    if not path.is_file():
        return None, f"{path}, the tokens to run it on, is not there; copy it from where the cache was made"
    windows = np.load(path, mmap_mode="r")
    return Windows(tokens=np.asarray(windows[plan.n_train_windows : plan.n_train_windows + n])), ""


def most_windows(cache: ActivationCache) -> int:
    """How many windows the log-probabilities of the clean model have room for."""
    n_bytes = cache.plan.window_tokens * int(cache.plan.model["vocab_size"]) * 4
    return max(1, min(N_SPLICE_WINDOWS, MAX_LOGIT_BYTES // n_bytes))


def packed_windows(loaded: LoadedModel, texts: Sequence[str], window_tokens: int) -> Windows:
    """Texts as harvest packs them: one after another, each window with the model's first token if it has one.

    An end that fills no window is left out, so few words may give no window at all.
    """
    first = loaded.tokenizer.bos_token_id
    ids = [loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    flat = np.array([token for text in ids for token in text], dtype=np.int64)  # pyright: ignore
    width = window_tokens - (first is not None)
    n = len(flat) // width
    tokens = flat[: n * width].reshape(n, width)
    if first is not None:
        tokens = np.concatenate([np.full((n, 1), first, dtype=np.int64), tokens], axis=1)
    return Windows(tokens=tokens)


def make_splice(source: Source, windows: Windows, purpose: str) -> Splice:
    """Test windows whose activations are replaced at every token that is not special."""
    replaced = ~np.isin(windows.tokens, source.loaded.special_ids)
    device = source.loaded.device
    return Splice(
        loaded=source.loaded,
        hook_point=source.hook_point,
        tokens=torch.from_numpy(windows.tokens.astype(np.int64)).to(device),
        replaced=torch.from_numpy(replaced).to(device),
        rows=Rows(
            x=source.rows(purpose, windows.tokens, replaced),
            features=None if windows.features is None else windows.features[replaced],
        ),
    )


def sampled_rows(source: Source, windows: Windows, purpose: str, seed: int) -> Rows:
    """An even sample of at most MAX_SHIFTED_ROWS tokens that are not special."""
    ordinary = ~np.isin(windows.tokens, source.loaded.special_ids)
    keep = thinned(ordinary.reshape(-1), MAX_SHIFTED_ROWS, np.random.default_rng(derive_seed(purpose, seed)))
    keep = keep.reshape(windows.tokens.shape)
    features = None if windows.features is None else windows.features[keep]
    return Rows(x=source.rows(purpose, windows.tokens, keep), features=features)


def thinned(chosen: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """Booleans of the same shape [n], at most `most` of them true, drawn evenly from the true ones."""
    numbers = np.flatnonzero(chosen)
    kept = np.zeros_like(chosen)
    kept[numbers if len(numbers) <= most else generator.choice(numbers, most, replace=False)] = True
    return kept
