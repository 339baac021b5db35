"""Make the bench: the rows, labelled text and model that all runs of one cache and hook point share."""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from cache_spec import ActivationCache, HookPlan, UserError
from cache_spec.hook_point import HookPoint
from cache_spec.plan import VariantPlan
from evaluate.cache_model import EMBEDDED_MODEL, name_of_model
from evaluate.generated_text import make_language, shifted_sample
from evaluate.held_out import read_held_out
from evaluate.labelled_text import TextTask, read_labelled, read_plain_text
from evaluate.language import Language
from evaluate.masked_language import MaskedLanguage, make_masked_language
from evaluate.public_ood import public_tasks
from evaluate.spelling import make_spelling
from evaluate.store import Store
from evaluate.subject import Bench, ModelFacts
from evaluate.tasks import ProbeData
from evaluate.text_rows import make_text_tasks
from evaluate.text_sources import TextSources
from evaluate.windows import (
    Source,
    Windows,
    generated_windows,
    held_out_windows,
    make_splice,
    most_windows,
    packed_windows,
    sampled_rows,
)
from harvest.model import LoadedModel, load_model

WHAT = {  # a field of the bench in words: what is missing without it
    "splice": "loss with the reconstruction in place",
    "splice_shifted": "loss on shifted text",
    "shifted": "reconstruction of shifted text",
    "tasks": "probing and its out-of-distribution gap",
    "language": "absorption, recovery and hedging against ground truth",
    "masked_language": "co-activation of parents and children in the data",
    "spelling": "first-letter absorption",
}
NEEDS_MODEL = frozenset(WHAT)


def make_bench(
    cache: ActivationCache,
    hook: HookPlan,
    *,
    device: str,
    seed: int,
    wanted: Set[str],
    store: Store,
    sources: TextSources,
) -> Bench:
    """Read the held-out rows and make what is `wanted` (names of Bench fields) of the rest.

    What cannot be had is said in `Bench.missing`; only a cache without held-out rows and text that cannot be read are
    errors.
    """
    held_out = read_held_out(cache, hook, device)
    rows: dict[str, Any] = {
        "calibration": held_out.calibration,
        "clean": held_out.clean,
        "masked": held_out.masked,
        "replaced": held_out.replaced,
    }
    facts = {
        "cache_id": cache.plan.cache_id,
        "hook": hook.name,
        "seed": seed,
        "sources": sources.facts(),
    }
    texts = _Texts.read(sources)
    missing = [] if held_out.masked is not None else ["robustness and masked rows: the cache has no masked variant"]
    if "tasks" in wanted:
        missing += [note for task in texts.tasks for note in task.notes()]
    loaded, is_embedded = None, False
    if wanted & NEEDS_MODEL:
        loaded, is_embedded, reason = _model_of(cache, device)
        if loaded is None:
            names = ", ".join(WHAT[name] for name in WHAT if name in wanted)
            missing.append(f"what needs the model ({names}): {reason}")
    if loaded is None:
        return Bench(**rows, model=ModelFacts(id=str(cache.plan.model.get("id"))), facts=facts, missing=tuple(missing))
    making = _Making(
        cache=cache,
        source=Source(loaded=loaded, hook_point=HookPoint.parse(hook.hook_point), store=store),
        texts=texts,
        seed=seed,
        wanted=wanted,
        is_embedded=is_embedded,
    )
    made = dict(making.fields(missing))
    n_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    model = ModelFacts(id=str(cache.plan.model.get("id")), n_parameters=n_parameters)
    return Bench(**rows, **made, model=model, facts=facts, missing=tuple(missing))


def _model_of(cache: ActivationCache, device: str) -> tuple[LoadedModel | None, bool, str]:
    """The model that the cache was made with, whether it is the embedded one; or None and the reason."""
    facts = cache.plan.model
    name, is_embedded = name_of_model(cache)
    try:
        loaded = load_model(name, device=device, dtype=facts.get("dtype", "auto"))
    except UserError as error:
        return None, is_embedded, str(error)
    if loaded.revision != facts.get("revision"):
        return (
            None,
            is_embedded,
            (
                f"{facts['id']} is at revision {loaded.revision} here, and the cache was made with "
                f"{facts.get('revision')}; harvest again with this one to have them"
            ),
        )
    return loaded, is_embedded, ""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Texts:
    """The user's texts, read before the model is loaded, so that a mistake is said at once."""

    tasks: tuple[TextTask, ...]
    shifted: tuple[str, ...]

    @classmethod
    def read(cls, sources: TextSources) -> "_Texts":
        tasks = [task for path in sources.probe_data for task in read_labelled(path)]
        tasks += public_tasks() if sources.sae_probes else []
        shifted = () if sources.shifted_text is None else tuple(read_plain_text(sources.shifted_text))
        return cls(tasks=tuple(tasks), shifted=shifted)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Making:
    """What one model, hook point and set of texts give."""

    cache: ActivationCache
    source: Source
    texts: _Texts
    seed: int
    wanted: Set[str]
    is_embedded: bool

    def fields(self, missing: list[str]) -> Iterator[tuple[str, Any]]:
        """Names and values of the bench's optional fields; `missing` gets a sentence for each that cannot be had."""
        language = self._language(missing)
        yield "language", language
        if "tasks" in self.wanted:
            yield "tasks", self._tasks(language, missing)
        if "masked_language" in self.wanted and language is not None:
            yield "masked_language", self._masked_language(language)
        if "splice" in self.wanted:
            yield "splice", self._splice(missing)
        if self.wanted & {"shifted", "splice_shifted"}:
            yield from self._shifted(language, missing)
        if "spelling" in self.wanted:
            spelling, reason = make_spelling(
                self.source.loaded, self.source.hook_point, store=self.source.store, seed=self.seed
            )
            if spelling is None:
                missing.append(f"{WHAT['spelling']}: {reason}")
            yield "spelling", spelling

    def _language(self, missing: list[str]) -> Language | None:
        truth = {"language", "masked_language"}
        if not self.wanted & {*truth, "tasks", "shifted"}:
            return None
        if self.is_embedded:
            return make_language(self.source, self.seed)
        if self.wanted & truth:
            names = " and ".join(WHAT[name] for name in WHAT if name in self.wanted & truth)
            missing.append(
                f"{names}: they need ground truth, which the embedded model ({EMBEDDED_MODEL}) has, and this cache is "
                f"of {self.cache.plan.model.get('id')}"
            )
        return None

    def _tasks(self, language: Language | None, missing: list[str]) -> tuple[ProbeData, ...]:
        tasks = language.probe_data if language is not None else ()
        tasks += make_text_tasks(
            self.source.loaded, self.source.hook_point, self.texts.tasks, store=self.source.store, seed=self.seed
        )
        if not tasks:
            missing.append(f"{WHAT['tasks']}: there is no labelled text; give some with --probe-data or --sae-probes")
        return tasks

    def _masked_language(self, language: Language) -> MaskedLanguage | None:
        variant = _mask_of(self.cache)
        if variant is None:
            return None
        return make_masked_language(
            self.source.loaded,
            self.source.hook_point,
            language,
            seed=self.seed,
            mask_token=variant.mask_token,
            mask_prob=variant.mask_prob,
            store=self.source.store,
        )

    def _splice(self, missing: list[str]) -> Any:
        windows, reason = (
            (generated_windows(self.seed, "test"), "") if self.is_embedded else held_out_windows(self.cache)
        )
        if windows is None:
            missing.append(f"{WHAT['splice']}: {reason}")
            return None
        return make_splice(self.source, windows, "splice")

    def _shifted(self, language: Language | None, missing: list[str]) -> Iterator[tuple[str, Any]]:
        windows = self._shifted_windows()
        if not len(windows.tokens):
            if not self.is_embedded:
                why = "--shifted-text fills no window" if self.texts.shifted else "give text with --shifted-text"
                missing.append(f"{WHAT['shifted']}: {why}")
            return
        if self.texts.shifted or language is None:
            yield "shifted", sampled_rows(self.source, windows, "shifted", self.seed)
        else:
            yield "shifted", shifted_sample(language)
        if "splice_shifted" in self.wanted:
            n = max(1, most_windows(self.cache) // 2)  # a loss beside the main one
            features = None if windows.features is None else windows.features[:n]
            few = Windows(tokens=windows.tokens[:n], features=features)
            yield "splice_shifted", make_splice(self.source, few, "splice-shifted")

    def _shifted_windows(self) -> Windows:
        if self.is_embedded and not self.texts.shifted:
            return generated_windows(self.seed, "shifted")
        return packed_windows(self.source.loaded, self.texts.shifted, self.cache.plan.window_tokens)


def _mask_of(cache: ActivationCache) -> VariantPlan | None:
    """The masked variant whose mask string and probability stand for the cache's; None if there is none."""
    return next((variant for variant in cache.plan.variants if variant.kind == "mask"), None)
