"""The eight public out-of-distribution sets of Kantamneni et al. (arXiv 2502.16681), from an installed sae-probes.

Its files are read and its code is not: `pip install --no-deps sae-probes` is enough. Checked with 0.4.2.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numcodecs import Zstd

from cache_spec.errors import UserError
from cache_spec.seeds import derive_seed
from evaluate.labelled_text import Example, TextTask, csv_rows, task_of

PACKAGE = "sae_probes"
TASKS = {  # the file's name -> how its text shifts
    "5_hist_fig_ismale": "fictional characters",
    "6_hist_fig_isamerican": "a letter put into the name",
    "7_hist_fig_ispolitician": "surname first",
    "66_living-room": "translated to French",
    "67_social-security": "translated to Spanish",
    "73_control-group": "translated to German",
    "87_glue_cola": "GLUE-X",
    "90_glue_qnli": "GLUE-X",
}
# The two halves of one set name their classes differently. In the usual half of QNLI, 0 is entailment (as in GLUE).
RENAMED = {"90_glue_qnli": {"1": "0", "entailment": "0", "not_entailment": "1"}}
TEST_SHARE = 0.25


def public_tasks() -> list[TextTask]:
    """The eight tasks: three quarters of the usual text to fit on, a quarter to test on, and the whole shifted set.

    A text that is there twice is taken once (5 to 35 of 100 are, and would be in both halves), and not at all with two
    different labels. Raises UserError if the package is not installed or lacks a file.
    """
    folder = _data_folder()
    return [_task(folder, name) for name in TASKS]


def _data_folder() -> Path:
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "the public sets come with the package sae-probes, which is not installed; pip install --no-deps "
            "sae-probes (its data are all that is read)"
        )
    return Path(found.submodule_search_locations[0]) / "data"


def _task(folder: Path, name: str) -> TextTask:
    usual = _labelled(folder / "cleaned_data" / f"{name}.csv.zst")
    shifted = _labelled(folder / "OOD data" / f"{name}_OOD.csv.zst")
    renamed = RENAMED.get(name, {})
    by_text: dict[str, set[str]] = {}
    for text, label in usual:
        by_text.setdefault(text, set()).add(label)
    once = [(text, *labels) for text, labels in by_text.items() if len(labels) == 1]
    tested = _tested(name, [label for _, label in once])
    examples = [
        *(
            Example(text=text, label=label, part="test" if i in tested else "train")
            for i, (text, label) in enumerate(once)
        ),
        *(Example(text=text, label=renamed.get(label, label), part="ood") for text, label in shifted),
    ]
    return task_of(name, examples, f"{name} of sae-probes", origin="sae-probes")


def _tested(name: str, labels: list[str]) -> set[int]:
    """The numbers of the texts to test on: the same share of each class, the same every time."""
    generator = np.random.default_rng(derive_seed("evaluate/public test", name))
    values, chosen = np.array(labels), []
    for label in sorted(set(labels)):
        numbers = np.flatnonzero(values == label)
        chosen.extend(generator.permutation(numbers)[: round(TEST_SHARE * len(numbers))].tolist())
    return set(chosen)


def _labelled(path: Path) -> list[tuple[str, str]]:
    """(text, label) of every row, as they are in the file."""
    if not path.is_file():
        raise UserError(
            f"{path} is not there, so this sae-probes is another version; pip install --no-deps sae-probes==0.4.2"
        )
    try:
        content = bytes(Zstd().decode(path.read_bytes())).decode()
    except (RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); install sae-probes again") from error
    rows = csv_rows(str(path), content, "prompt")
    return [(row["prompt"], row["target"]) for _, row in rows]
