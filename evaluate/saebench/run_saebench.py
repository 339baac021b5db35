"""Run SAEBench's evaluations on the SAE of this folder: python run_saebench.py core sparse_probing

Written by granary and run without it, in an environment of SAEBench's own; README.md says how to make that.
"""
# pyright: reportMissingImports=false

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEED = 42  # SAEBench's own
# eval -> its module, its configuration, what that is told, and what its run_eval is told
EVALS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "absorption": ("sae_bench.evals.absorption.main", "AbsorptionEvalConfig", {}, {}),
    "sparse_probing": (
        "sae_bench.evals.sparse_probing.main",
        "SparseProbingEvalConfig",
        {},
        {"clean_up_activations": True, "save_activations": False},
    ),
    "sparse_probing_sae_probes": (
        "sae_bench.evals.sparse_probing_sae_probes.main",
        "SparseProbingSaeProbesEvalConfig",
        {},
        {},
    ),
    "scr": (
        "sae_bench.evals.scr_and_tpp.main",
        "ScrAndTppEvalConfig",
        {"perform_scr": True},
        {"clean_up_activations": True, "save_activations": False},
    ),
    "tpp": (
        "sae_bench.evals.scr_and_tpp.main",
        "ScrAndTppEvalConfig",
        {"perform_scr": False},
        {"clean_up_activations": True, "save_activations": False},
    ),
}
NAMES = ("core", *EVALS)
CORE = {  # what SAEBench's published core results were made with
    "n_eval_reconstruction_batches": 200,
    "n_eval_sparsity_variance_batches": 2000,
    "eval_batch_size_prompts": 16,
    "compute_featurewise_density_statistics": True,
    "compute_featurewise_weight_based_metrics": True,
    "exclude_special_tokens_from_reconstruction": True,
    "dataset": "Skylion007/openwebtext",
    "context_size": 128,
}
_NO_LLM_SETTINGS = ("sparse_probing_sae_probes",)  # its configuration has neither batch size nor dtype


def settings() -> dict[str, Any]:
    """What granary found out about the SAE."""
    return json.loads((HERE / "saebench.json").read_text())


def load_sae(device: str, dtype: str) -> Any:
    """The SAE as a SAELens object, under the name by which SAEBench knows its model."""
    import torch
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(HERE / "sae"), device=device)
    sae.cfg.metadata.model_name = settings()["model_name"]
    sae.cfg.dtype = dtype
    return sae.to(device=device, dtype=getattr(torch, dtype))


def run(name: str, sae: Any, device: str, out: Path, again: bool) -> bool:
    """Run one evaluation; says whether there are results."""
    facts = settings()
    selected, folder = [(facts["name"], sae)], out / name
    folder.mkdir(parents=True, exist_ok=True)
    if name == "core":
        core = importlib.import_module("sae_bench.evals.core.main")
        core.multiple_evals(
            selected_saes=selected,
            output_folder=str(folder),
            dtype=facts["llm_dtype"],
            device=device,
            force_rerun=again,
            verbose=True,
            **CORE,
        )
    else:
        module, config, told, run_told = EVALS[name]
        evaluation = importlib.import_module(module)
        facts_of_llm = {"llm_batch_size": facts["llm_batch_size"], "llm_dtype": facts["llm_dtype"]}
        made = getattr(evaluation, config)(
            model_name=facts["model_name"],
            random_seed=SEED,
            **({} if name in _NO_LLM_SETTINGS else facts_of_llm),
            **told,
        )
        evaluation.run_eval(made, selected, device, str(folder), force_rerun=again, **run_told)
    return any(folder.rglob("*_eval_results.json"))  # the core catches its own errors and only logs them


def main() -> int:
    """Run what was asked for; exit code 1 if an evaluation left no results."""
    # SAEBench's sparse probing contradicts the shapes it declares, which jaxtyping notices with beartype 0.23
    os.environ.setdefault("JAXTYPING_DISABLE", "1")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evals", nargs="*", metavar="EVAL", help=f"of {', '.join(NAMES)}; default: as prepared")
    parser.add_argument("--device", default="cuda", help="cuda, cpu or mps")
    parser.add_argument("--out", type=Path, default=HERE / "eval_results")
    parser.add_argument("--again", action="store_true", help="also what has results")
    asked = parser.parse_args()
    if unknown := [name for name in asked.evals if name not in NAMES]:
        parser.error(f"there is no evaluation {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for warning in settings()["warnings"]:
        print(f"note: {warning}", file=sys.stderr)
    without = []
    for name in asked.evals or settings()["evals"]:
        sae = load_sae(asked.device, settings()["llm_dtype"])
        if not run(name, sae, asked.device, asked.out, asked.again):
            without.append(name)
    if without:
        print(f"error: no results of {', '.join(without)}; see above why", file=sys.stderr)
    return 1 if without else 0


if __name__ == "__main__":
    raise SystemExit(main())
