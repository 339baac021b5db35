"""A small language with known features, and a language model trained on it: real data with ground truth, offline."""

from harvest.embedded.corpus import (
    PROBE_TASKS,
    RELATIONS,
    VALUE_NAMES,
    WINDOW_TOKENS,
    Corpus,
    ProbeTask,
    Relation,
    documents,
    generate,
    ground_truth_features,
)
from harvest.embedded.folder import FOLDER, HOOK_POINT

__all__ = [
    "FOLDER",
    "HOOK_POINT",
    "PROBE_TASKS",
    "RELATIONS",
    "VALUE_NAMES",
    "WINDOW_TOKENS",
    "Corpus",
    "ProbeTask",
    "Relation",
    "documents",
    "generate",
    "ground_truth_features",
]
