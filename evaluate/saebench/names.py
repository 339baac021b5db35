"""Which of our columns SAEBench has too: its nesting under `eval_result_metrics`, and its names."""

from collections.abc import Mapping
from typing import Any

_FIRST_LETTER = ("mean_absorption_fraction_score", "mean_full_absorption_score", "mean_num_split_features")
_KS = (1, 2, 5, 10, 20, 50, 100)
# our metric -> SAEBench's section -> SAEBench's name -> our column
SAEBENCH: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "core": {
        "model_behavior_preservation": {
            name: name for name in ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae")
        },
        "model_performance_preservation": {
            name: name for name in ("ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae")
        },
        "reconstruction_quality": {
            name: name for name in ("explained_variance", "explained_variance_legacy", "mse", "cossim")
        },
        "shrinkage": {"l2_ratio": "l2_ratio"},
        "sparsity": {"l0": "l0"},
        "misc_metrics": {"frac_alive": "frac_alive"},
    },
    # `absorption` asks the same of the embedded language's own families; only first letters are SAEBench's task
    "first_letter": {"mean": {name: f"first_letter_{name}" for name in _FIRST_LETTER}},
    "probing": {
        "llm": {"llm_test_accuracy": "llm_test_accuracy"},
        "sae": {name: name for name in (f"sae_top_{k}_test_accuracy" for k in _KS)},
    },
}


def nested(numbers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Our numbers (metric -> column -> value) as SAEBench nests them; what was not measured is not there."""
    sections = {
        section: {theirs: numbers[metric][ours] for theirs, ours in names.items() if ours in numbers[metric]}
        for metric, by_section in SAEBENCH.items()
        if metric in numbers
        for section, names in by_section.items()
    }
    return {section: values for section, values in sections.items() if values}
