"""Labelled text of the embedded language: three corpora, run through the model."""

import numpy as np

from cache_spec.seeds import derive_seed
from evaluate.language import EVERYWHERE, PARENT_ROWS, PROBE_ROWS, Language
from evaluate.rows import Rows
from evaluate.windows import Source, thinned
from harvest import embedded

N_DOCUMENTS = {"fit": 1500, "test": 1500, "shifted": 1000}
N_EVERYWHERE = 20000  # tokens of the even samples that recovery is measured on, and shifted reconstruction


def make_language(source: Source, seed: int) -> Language:
    """Write three corpora, run the model on them, and label the rows.

    Kept are as many rows as relations and probe tasks read at most, and an even sample of the tokens of "fit" (for the
    oracle), of "test" (for recovery) and of "shifted".
    """
    corpora = {
        part: embedded.generate(n_documents, derive_seed("evaluate/text", seed, part), part == "shifted")
        for part, n_documents in N_DOCUMENTS.items()
    }
    generators = {part: np.random.default_rng(derive_seed("evaluate/rows", seed, part)) for part in corpora}
    even = {part: _even_sample(corpora[part], generators[part]) for part in corpora}
    positions = {part: _read_positions(corpora[part], generators[part]) for part in corpora}
    for part in ("test", "shifted"):
        positions[part][EVERYWHERE] = even[part]
    rows = {part: _labelled(source, f"text-{part}", corpora[part], positions[part]) for part in corpora}
    _, names = embedded.ground_truth_features(corpora["test"])
    return Language(
        **rows,
        even=_labelled(source, "text-even", corpora["fit"], {EVERYWHERE: even["fit"]}),
        relations=embedded.RELATIONS,
        tasks=embedded.PROBE_TASKS,
        value_names=embedded.VALUE_NAMES,
        feature_names=names,
        seed=seed,
    )


def shifted_sample(language: Language) -> Rows:
    """The even sample of the shifted text's tokens, as rows of its own."""
    keep = language.shifted.positions[EVERYWHERE]
    features = language.shifted.features
    return Rows(x=language.shifted.x[keep], features=None if features is None else features[keep])


def _even_sample(corpus: embedded.Corpus, generator: np.random.Generator) -> np.ndarray:
    """Booleans [n_tokens], true at a sample of all tokens but the first of each window."""
    text = np.ones(corpus.tokens.shape, dtype=bool)
    text[:, 0] = False
    return thinned(text.reshape(-1), N_EVERYWHERE, generator)


def _read_positions(corpus: embedded.Corpus, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """The position sets that something reads, [n_tokens] each, thinned to what it reads at most."""
    most = {task.positions: PROBE_ROWS for task in embedded.PROBE_TASKS}
    most |= {relation.positions: PARENT_ROWS for relation in embedded.RELATIONS}
    return {name: thinned(corpus.positions[name].reshape(-1), n, generator) for name, n in most.items()}


def _labelled(source: Source, purpose: str, corpus: embedded.Corpus, positions: dict[str, np.ndarray]) -> Rows:
    """Activations and labels of the tokens that are in any of the position sets."""
    keep = np.any(list(positions.values()), axis=0)
    features, _ = embedded.ground_truth_features(corpus)
    return Rows(
        x=source.rows(purpose, corpus.tokens, keep.reshape(corpus.tokens.shape)),
        attributes={name: values.reshape(-1)[keep] for name, values in corpus.attributes.items()},
        positions={name: values[keep] for name, values in positions.items()},
        features=features[keep],
    )
