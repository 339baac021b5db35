"""A folder to run SAEBench on one SAE, in an environment of SAEBench's own: its pins exclude ours.

What SAEBench would warn of or refuse is said here, before anybody waits for its downloads.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cache_spec.errors import UserError
from cache_spec.files import readable_json
from cache_spec.markdown import plain
from cache_spec.untrusted import printable
from evaluate.saebench.run_saebench import NAMES
from train.known import check_facts
from train.pushing import SAE_ID, without_paths
from train.run_folder import CFG, FACTS, WEIGHTS, TrainedRun, load_run

DEFAULT_EVALS = ("core", "sparse_probing", "absorption")
# what SAEBench knows a model's batch size and dtype by, and its name on the hub
_KNOWN = {
    "pythia-70m-deduped": ("EleutherAI/pythia-70m-deduped", 512, "float32"),
    "pythia-160m-deduped": ("EleutherAI/pythia-160m-deduped", 256, "float32"),
    "gemma-2-2b": ("google/gemma-2-2b", 32, "bfloat16"),
    "gemma-2-9b": ("google/gemma-2-9b", 32, "bfloat16"),
}
_UNKNOWN_BATCH, _UNKNOWN_DTYPE = 16, "float32"
_UNIT = 1e-5  # SAEBench's tolerance on the length of a decoder row
_WIDE = 16_384  # from this width on SAEBench's authors read its absorption scores
REQUIREMENTS = """\
# What SAEBench 0.6.0 was tried with on Python 3.11.
# The environment cannot be granary's: SAEBench wants numpy below 2 and datasets below 4.
sae-bench==0.6.0
sae-lens==6.54.12
transformer-lens==3.9.0
numpy<2
datasets<4
torchvision<0.26  # later ones lack the VideoReader that datasets below 4 imports
"""
_PLACE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What went into the folder: saebench.json."""

    name: str
    model_name: str
    llm_dtype: str
    llm_batch_size: int
    evals: tuple[str, ...]
    warnings: tuple[str, ...]


def prepare(run_folder: Path, out: Path, *, evals: Sequence[str] = (), model_name: str = "") -> Prepared:
    """Make the folder `out`, which must not be there or be empty.

    Raises UserError for what SAEBench cannot do at all: a transcoder, a model that is on no hub, an unknown eval.
    """
    chosen = tuple(evals) or DEFAULT_EVALS
    if unknown := [name for name in chosen if name not in NAMES]:
        raise UserError(f"there is no evaluation '{unknown[0]}'; there are {', '.join(NAMES)}")
    run = load_run(run_folder)
    check_facts(run.facts, run_folder / FACTS)
    if not SAE_ID.fullmatch(name := run.facts["name"]):
        raise UserError(
            f"{run_folder / FACTS} says name is {name!r:.40}, and SAEBench names files by it: letters, digits and ._- "
            "can be in it; train the run again"
        )
    if run.sae.is_transcoder:
        raise UserError(f"{run_folder} is a transcoder, and SAEBench compares an SAE with its own input; give an SAE")
    _refuse_taken(out)
    model = _model(run, model_name)
    _, batch_size, dtype = _KNOWN.get(model, ("", _UNKNOWN_BATCH, _UNKNOWN_DTYPE))
    prepared = Prepared(
        name=name,
        model_name=model,
        llm_dtype=dtype,
        llm_batch_size=batch_size,
        evals=chosen,
        warnings=tuple(map(printable, _warnings(run, model, chosen))),
    )
    _write(run_folder, out, prepared)
    return prepared


def _model(run: TrainedRun, given: str) -> str:
    """The name by which TransformerLens, and so SAEBench, loads the model."""
    found = given or str(run.facts["cache"]["model"])
    for short, (hub_id, _, _) in _KNOWN.items():
        if found in (short, hub_id):
            return short
    if not given and not re.fullmatch(r"[\w.-]+/[\w.-]+", found):
        raise UserError(
            f"{run.path} reads the model '{found}', which is on no hub, and SAEBench loads models through "
            "TransformerLens; if TransformerLens has it under some name, give that with --model-name"
        )
    return found


def _warnings(run: TrainedRun, model: str, evals: Sequence[str]) -> list[str]:
    sae, told = run.sae, []
    if model not in _KNOWN:
        told.append(
            f"SAEBench has no settings for {model}, only for {', '.join(_KNOWN)}: batches of {_UNKNOWN_BATCH} in "
            f"{_UNKNOWN_DTYPE} are taken, and there are no published results to compare with"
        )
    if sae.d_sae < sae.d_model:
        told.append(
            f"the dictionary has {sae.d_sae} latents for {sae.d_model} dimensions; SAEBench's own loaders refuse fewer "
            "latents than dimensions, and its results have none such"
        )
    off = (sae.W_dec.norm(dim=1) - 1).abs()
    if n_off := int((off > _UNIT).sum()):
        told.append(
            f"{n_off} of {sae.d_sae} decoder rows are not of length 1 (off by up to {float(off.max()):.2g}); SAEBench "
            "warns, and its scores that rank latents by their codes are not comparable"
        )
    if "absorption" in evals and "gemma" not in model:
        told.append(
            "SAEBench recommends absorption for models of 2B parameters and more; smaller ones may spell too ill"
        )
    if "absorption" in evals and sae.d_sae < _WIDE:
        told.append(f"absorption says little below {_WIDE:,} latents, and this SAE has {sae.d_sae:,}")
    if not run.facts["cache"]["tl_name"].endswith("hook_resid_post"):
        told.append(f"SAEBench's results are of hook_resid_post, and this SAE reads {run.facts['cache']['tl_name']}")
    return told


def _refuse_taken(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} is there and not empty; give a new folder, or move it away")


def _write(run_folder: Path, out: Path, prepared: Prepared) -> None:
    """All of it beside `out`, then renamed: a folder that is there is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        (made / "sae").mkdir()
        config = json.loads((run_folder / CFG).read_text())
        (made / "sae" / CFG).write_bytes(readable_json(without_paths(config)))
        shutil.copyfile(run_folder / WEIGHTS, made / "sae" / WEIGHTS)
        shutil.copyfile(_PLACE / "run_saebench.py", made / "run_saebench.py")
        (made / "requirements.txt").write_text(REQUIREMENTS)
        (made / "saebench.json").write_bytes(readable_json(vars(prepared)))
        (made / "README.md").write_text(readme(prepared))
        made.chmod(0o755)  # mkdtemp's is for the owner alone
        os.replace(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def readme(prepared: Prepared) -> str:
    """The recipe, command by command."""
    notes = "\n".join(f"- {plain(warning)}" for warning in prepared.warnings) or "- none"
    return f"""# SAEBench on {plain(prepared.name)}

The SAE in `sae/` is a SAELens folder. SAEBench needs an environment of its own, the model and its data sets from the
hub, and for most evaluations a GPU:

```sh
python3.11 -m venv .venv-saebench
.venv-saebench/bin/pip install -r requirements.txt
.venv-saebench/bin/python run_saebench.py {" ".join(prepared.evals)} --device cuda
```

Results are written below `eval_results/<evaluation>/`, one JSON file each; what has results is not run again without
`--again`. `run_saebench.py --help` lists the evaluations. Those not in it need more than an SAE: autointerp a key of a
language model's service, unlearning a gated data set, ravel models that SAEBench lists.

Model: `{prepared.model_name}`, {prepared.llm_dtype}, batches of {prepared.llm_batch_size} (`saebench.json`).

## Before you compare

{notes}
"""
