"""Make the bench: the rows, labelled text and model that all runs of one cache and hook point share."""

from dataclasses import dataclass

import numpy as np
import torch

from cache_spec import ActivationCache, CacheDamaged, CacheError, HookPlan, UserError, ordinary_rows
from cache_spec.hook_point import HookPoint
from cache_spec.seeds import derive_seed
from evaluate.language import EVERYWHERE, PARENT_ROWS, PROBE_ROWS, Language
from evaluate.rows import Rows
from evaluate.splicing import MAX_LOGIT_BYTES, Splice, model_rows
from evaluate.subject import Bench
from harvest import embedded
from harvest.model import LoadedModel, load_model

EMBEDDED_MODEL = "tiny"
MODEL_COLUMNS = "columns that need the model (loss with the reconstruction in place)"
MAX_ROWS = 65536  # most rows to calibrate on, and most to score
N_DOCUMENTS = {"fit": 1500, "test": 1500, "shifted": 1000}
N_EVERYWHERE = 20000  # tokens of the even sample that recovery is measured on
N_SPLICE_WINDOWS = 200


def make_bench(
    cache: ActivationCache, hook: HookPlan, *, device: str, seed: int, with_model: bool, with_language: bool
) -> Bench:
    """Read the held-out rows and, if asked for, load the model and write labelled text.

    What cannot be had is said in `Bench.missing`; only a cache without held-out rows is an error.
    """
    held_out = read_held_out(cache, hook, device)
    facts, missing = cache.plan.model, []
    loaded = language = splice = None
    embedded_revision = load_model(EMBEDDED_MODEL, weights=False).revision
    is_embedded = facts.get("revision") == embedded_revision  # by content: its folder may have been given instead
    if with_model or (with_language and is_embedded):
        loaded, reason = _same_model(cache, device, EMBEDDED_MODEL if is_embedded else facts["id"])
        if loaded is None:
            missing.append(f"{MODEL_COLUMNS} are missing: {reason}")
    if with_language and not is_embedded:
        missing.append(
            f"columns that need ground truth are missing: they exist for the embedded model ({EMBEDDED_MODEL} at "
            f"{embedded_revision}) only, and this cache is of {facts.get('id')} at {facts.get('revision')}"
        )
    if with_language and is_embedded and loaded is not None:
        language = make_language(loaded, HookPoint.parse(hook.hook_point), seed)
    elif with_language and is_embedded:
        missing.append("columns that need ground truth are missing, because they need the model too")
    if with_model and loaded is not None:
        windows, reason = (splice_windows(seed), "") if is_embedded else _held_out_windows(cache)
        if windows is None:
            missing.append(f"{MODEL_COLUMNS} are missing: {reason}")
        else:
            splice = make_splice(loaded, hook, windows.tokens, windows.features)
    return Bench(
        calibration=held_out.calibration,
        clean=held_out.clean,
        masked=held_out.masked,
        replaced=held_out.replaced,
        language=language,
        splice=splice,
        missing=tuple(missing),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """The held-out rows of a cache: calibration and scored rows come from different documents."""

    calibration: Rows
    clean: Rows
    masked: Rows | None
    replaced: np.ndarray | None


def read_held_out(cache: ActivationCache, hook: HookPlan, device: str) -> HeldOut:
    """Up to 65,536 rows to calibrate on (documents with odd numbers) and as many to score, specials left out.

    Raises CacheError if the cache holds no rows out of training, or too few to split, and CacheDamaged if some are not
    finite.
    """
    masked = _masked_variant(cache)
    pieces: dict[str, list[np.ndarray]] = {"calibration": [], "clean": [], "masked": [], "replaced": []}
    for shard in cache.held_out_shards:
        usable = ordinary_rows(cache.column("flags", shard))
        odd = cache.column("doc", shard) % 2 == 1
        calibrating, scored = np.flatnonzero(usable & odd), np.flatnonzero(usable & ~odd)
        clean = cache.activations(hook.name, "clean", shard)
        pieces["calibration"].append(clean[calibrating])
        pieces["clean"].append(clean[scored])
        if masked is not None:
            bit, name = masked
            pieces["masked"].append(cache.activations(hook.name, name, shard)[scored])
            pieces["replaced"].append((cache.column("mask", shard)[scored] >> bit) & 1 == 1)
        if min(_n_rows(pieces["calibration"]), _n_rows(pieces["clean"])) >= MAX_ROWS:
            break
    if not min(_n_rows(pieces["calibration"]), _n_rows(pieces["clean"])):
        raise CacheError(
            f"{cache.path} holds no two documents kept out of training to score on; harvest it with --held-out 0.05"
        )

    def rows(name: str) -> Rows:
        stacked = np.concatenate(pieces[name])[:MAX_ROWS].astype(np.float32) * np.float32(hook.scale_factor)
        if not np.isfinite(stacked).all():
            raise CacheDamaged(
                f"{cache.path} holds numbers that are not finite in {hook.name}/{name}, out of training; "
                f"python -m cache_spec verify {cache.path} says where"
            )
        return Rows(x=torch.from_numpy(stacked).to(device))

    return HeldOut(
        calibration=rows("calibration"),
        clean=rows("clean"),
        masked=rows("masked") if masked else None,
        replaced=np.concatenate(pieces["replaced"])[:MAX_ROWS] if masked else None,
    )


def _n_rows(pieces: list[np.ndarray]) -> int:
    return sum(map(len, pieces))


def _masked_variant(cache: ActivationCache) -> tuple[int, str] | None:
    """(bit in the mask column, name) of the variant whose rows are scored beside the clean ones."""
    others = [variant.name for variant in cache.plan.variants[1:]]
    if not others:
        return None
    name = "masked" if "masked" in others else others[0]
    return others.index(name), name


def _same_model(cache: ActivationCache, device: str, name: str) -> tuple[LoadedModel | None, str]:
    """The model that the cache was made with, loaded by `name`, or None and the reason."""
    facts = cache.plan.model
    try:
        loaded = load_model(name, device=device, dtype=facts.get("dtype", "auto"))
    except UserError as error:
        return None, str(error)
    if loaded.revision != facts.get("revision"):
        return None, (
            f"{facts['id']} is at revision {loaded.revision} here, and the cache was made with "
            f"{facts.get('revision')}; harvest again with this one to have them"
        )
    return loaded, ""


@dataclass(frozen=True, kw_only=True, eq=False)
class SpliceWindows:
    """Whole test windows: tokens [n_windows, window] and, if known, features, bool [n_windows, window, n_features]."""

    tokens: np.ndarray
    features: np.ndarray | None = None


def splice_windows(seed: int) -> SpliceWindows:
    """The first windows of the "test" text that `make_language` writes with this seed, whole."""
    corpus = embedded.generate(min(N_SPLICE_WINDOWS, N_DOCUMENTS["test"]), derive_seed("evaluate/text", seed, "test"))
    features, _ = embedded.ground_truth_features(corpus)
    return SpliceWindows(tokens=corpus.tokens, features=features.reshape(*corpus.tokens.shape, -1))


def make_language(loaded: LoadedModel, hook_point: HookPoint, seed: int) -> Language:
    """Write three corpora, run the model on them, and label the rows.

    Kept are as many rows as relations and probe tasks read at most, and an even sample of the tokens of "fit" (for the
    oracle) and of "test" (for recovery).
    """
    corpora = {
        part: embedded.generate(n_documents, derive_seed("evaluate/text", seed, part), part == "shifted")
        for part, n_documents in N_DOCUMENTS.items()
    }
    generators = {part: np.random.default_rng(derive_seed("evaluate/rows", seed, part)) for part in corpora}
    even = {part: _even_sample(corpora[part], generators[part]) for part in ("fit", "test")}
    positions = {part: _read_positions(corpora[part], generators[part]) for part in corpora}
    positions["test"][EVERYWHERE] = even["test"]
    rows = {part: _labelled(loaded, hook_point, corpora[part], positions[part]) for part in corpora}
    _, names = embedded.ground_truth_features(corpora["test"])
    return Language(
        **rows,
        even=_labelled(loaded, hook_point, corpora["fit"], {EVERYWHERE: even["fit"]}),
        relations=embedded.RELATIONS,
        tasks=embedded.PROBE_TASKS,
        value_names=embedded.VALUE_NAMES,
        feature_names=names,
        seed=seed,
    )


def _even_sample(corpus: embedded.Corpus, generator: np.random.Generator) -> np.ndarray:
    """Booleans [n_tokens], true at a sample of all tokens but the first of each window."""
    text = np.ones(corpus.tokens.shape, dtype=bool)
    text[:, 0] = False
    return _thinned(text.reshape(-1), N_EVERYWHERE, generator)


def _read_positions(corpus: embedded.Corpus, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """The position sets that something reads, [n_tokens] each, thinned to what it reads at most."""
    most = {task.positions: PROBE_ROWS for task in embedded.PROBE_TASKS}
    most |= {relation.positions: PARENT_ROWS for relation in embedded.RELATIONS}
    return {name: _thinned(corpus.positions[name].reshape(-1), n, generator) for name, n in most.items()}


def _thinned(chosen: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    numbers = np.flatnonzero(chosen)
    kept = np.zeros_like(chosen)
    kept[numbers if len(numbers) <= most else generator.choice(numbers, most, replace=False)] = True
    return kept


def _labelled(
    loaded: LoadedModel, hook_point: HookPoint, corpus: embedded.Corpus, positions: dict[str, np.ndarray]
) -> Rows:
    """Activations and labels of the tokens that are in any of the position sets."""
    keep = np.any(list(positions.values()), axis=0)
    features, _ = embedded.ground_truth_features(corpus)
    where = torch.from_numpy(keep.reshape(corpus.tokens.shape))
    return Rows(
        x=model_rows(loaded, hook_point, torch.from_numpy(corpus.tokens), where),
        attributes={name: values.reshape(-1)[keep] for name, values in corpus.attributes.items()},
        positions={name: values[keep] for name, values in positions.items()},
        features=features[keep],
    )


def make_splice(loaded: LoadedModel, hook: HookPlan, tokens: np.ndarray, features: np.ndarray | None = None) -> Splice:
    """Test windows [n, window] whose activations are replaced at every token that is not special.

    features: bool [n, window, n_features], what the oracle reconstructs from.
    """
    special = np.isin(tokens, loaded.special_ids)
    windows, replaced = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(~special).to(loaded.device)
    hook_point = HookPoint.parse(hook.hook_point)
    return Splice(
        loaded=loaded,
        hook_point=hook_point,
        tokens=windows.to(loaded.device),
        replaced=replaced,
        rows=Rows(
            x=model_rows(loaded, hook_point, windows, replaced),
            features=None if features is None else features[~special],
        ),
    )


def _held_out_windows(cache: ActivationCache) -> tuple[SpliceWindows | None, str]:
    """Held-out windows of the cache, as many as the log-probabilities have room for; or None and the reason."""
    plan = cache.plan
    n_bytes = plan.window_tokens * int(plan.model["vocab_size"]) * 4
    n = max(1, min(N_SPLICE_WINDOWS, plan.n_held_out_windows, MAX_LOGIT_BYTES // n_bytes))
    path = cache.path / "_granary" / "windows.npy"
    if not path.is_file():
        return None, f"{path}, the tokens to run it on, is not there; copy it from where the cache was made"
    windows = np.load(path, mmap_mode="r")
    return SpliceWindows(tokens=np.asarray(windows[plan.n_train_windows : plan.n_train_windows + n])), ""
