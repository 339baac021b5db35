"""What goes to SAEBench: a folder that holds all it needs, its warnings beforehand, and names that it really has."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from train_fixtures import make_training_cache, run_config
from typer.main import get_command

from cache_spec import UserError
from evaluate.commands.saebench import app
from evaluate.metrics import core, first_letter, probing
from evaluate.saebench.names import SAEBENCH, nested
from evaluate.saebench.prepare import DEFAULT_EVALS, prepare
from evaluate.saebench.run_saebench import CORE, NAMES
from evaluate.saebench.run_saebench import EVALS as SCRIPTED
from train import DataConfig, MixedBatchLoader, train_sweep
from train.run_folder import load_run, without_seal

WHEEL = os.environ.get("SAEBENCH_WHEEL", "")  # of `pip download --no-deps sae-bench==0.6.0`
PYTHIA = "EleutherAI/pythia-160m-deduped"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a-place-of-this-machine")
    cache = make_training_cache(folder / "cache.zarr", layers=(1, 2))
    data = DataConfig(hook="layer_1", n_tokens=320, batch_size=32)
    train_sweep(MixedBatchLoader(cache, data), [run_config(), run_config(name="narrow", d_sae=4)], out=folder / "runs")
    to_2 = DataConfig(hook="layer_1", n_tokens=320, batch_size=32, target_hook="layer_2")
    train_sweep(MixedBatchLoader(cache, to_2), [run_config(name="transcoder")], out=folder / "runs")
    return folder / "runs"


def changed(run: Path, copy: Path, change) -> Path:
    """A copy of a run whose decoder is changed."""
    copy.mkdir()
    for file in run.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load((copy / "sae_weights.safetensors").read_bytes())
    (copy / "sae_weights.safetensors").write_bytes(save({**tensors, "W_dec": change(tensors["W_dec"])}))
    facts = json.loads((copy / "run.json").read_text())  # whose checksums would refuse it
    (copy / "run.json").write_text(json.dumps({**without_seal(facts), "files": {}}))
    return copy


def test_the_folder_holds_the_sae_the_script_the_pins_and_the_commands(trained, tmp_path):
    out, run = tmp_path / "new" / "bench", changed(trained / "batchtopk", tmp_path / "run", lambda W_dec: W_dec)
    config = json.loads((run / "cfg.json").read_text())
    config["metadata"]["dataset_path"] = str(trained / "text.jsonl")  # a text of the user's own
    (run / "cfg.json").write_text(json.dumps(config))
    prepared = prepare(run, out, model_name=PYTHIA)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    sae = {"sae/cfg.json", "sae/sae_weights.safetensors"}
    assert files == sae | {"README.md", "requirements.txt", "run_saebench.py", "saebench.json"}
    assert (out / "sae/sae_weights.safetensors").read_bytes() == (
        trained / "batchtopk/sae_weights.safetensors"
    ).read_bytes()
    facts = json.loads((out / "saebench.json").read_text())
    assert (facts["model_name"], facts["llm_dtype"], facts["llm_batch_size"]) == ("pythia-160m-deduped", "float32", 256)
    assert tuple(facts["evals"]) == DEFAULT_EVALS
    pins = (out / "requirements.txt").read_text().splitlines()
    assert {"sae-bench==0.6.0", "numpy<2", "datasets<4"} <= {pin.split(" ")[0] for pin in pins}
    readme = (out / "README.md").read_text()
    assert f"run_saebench.py {' '.join(DEFAULT_EVALS)} --device cuda" in readme
    assert all(warning[:20] in readme for warning in prepared.warnings)
    assert [entry.name for entry in out.parent.iterdir()] == ["bench"]
    assert not [path for path in out.rglob("*") if path.is_file() and b"a-place-of-this-machine" in path.read_bytes()]


def test_the_script_lists_its_evals_without_saebench_and_refuses_others(trained, tmp_path):
    prepare(trained / "batchtopk", tmp_path / "bench", model_name=PYTHIA)
    script = [sys.executable, "-I", str(tmp_path / "bench/run_saebench.py")]
    shown = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in NAMES)
    refused = subprocess.run([*script, "sparse"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "there is no evaluation sparse" in refused.stderr


def test_a_sound_sae_of_a_known_model_gets_no_warning(trained, tmp_path):
    assert prepare(trained / "batchtopk", tmp_path / "bench", model_name=PYTHIA, evals=["core"]).warnings == ()


@pytest.mark.parametrize(
    ("run", "options", "said"),
    [
        ("narrow", {"evals": ["core"]}, "4 latents for 8 dimensions"),
        ("batchtopk", {"evals": ["absorption"]}, "2B parameters"),
        ("batchtopk", {"evals": ["absorption"]}, "below 16,384 latents"),
        (
            "batchtopk",
            {"evals": ["core"], "model_name": "openai-community/gpt2"},
            "no settings for openai-community/gpt2",
        ),
    ],
)
def test_what_saebench_would_warn_of_is_said_before(trained, tmp_path, run, options, said):
    warnings = prepare(trained / run, tmp_path / "bench", **{"model_name": PYTHIA, **options}).warnings
    assert [warning for warning in warnings if said in warning]


def test_decoder_rows_of_another_length_are_counted(trained, tmp_path):
    factor = torch.ones(32, 1)
    factor[:3] = 2
    run = changed(trained / "batchtopk", tmp_path / "run", lambda W_dec: W_dec * factor)
    (warning,) = prepare(run, tmp_path / "bench", model_name=PYTHIA, evals=["core"]).warnings
    assert warning.startswith("3 of 32 decoder rows are not of length 1 (off by up to 1)")
    assert float(load_run(trained / "batchtopk").sae.W_dec.norm(dim=1).sub(1).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("run", "options", "said"),
    [
        ("batchtopk", {}, r"model 'made-up', which is on no hub.* --model-name"),
        ("transcoder", {"model_name": PYTHIA}, "is a transcoder"),
        ("batchtopk", {"model_name": PYTHIA, "evals": ["unlearning"]}, "no evaluation 'unlearning'; there are core"),
        ("nothing", {"model_name": PYTHIA}, "is not a run"),
    ],
)
def test_what_saebench_cannot_do_is_refused_and_leaves_nothing(trained, tmp_path, run, options, said):
    with pytest.raises(UserError, match=said):
        prepare(trained / run, tmp_path / "bench", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_is_left_alone(trained, tmp_path):
    (tmp_path / "bench").mkdir()
    prepare(trained / "batchtopk", tmp_path / "bench", model_name=PYTHIA)  # an empty one is as good as none
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is there and not empty"):
        prepare(trained / "batchtopk", tmp_path / "bench", model_name=PYTHIA)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_prints_what_to_heed_and_where_to_go_on(trained, tmp_path, capsys):
    words = [str(trained / "narrow"), "--out", str(tmp_path / "bench"), "--evals", "core, tpp", "--model-name", PYTHIA]
    app(words, standalone_mode=False)
    shown = capsys.readouterr().out
    assert "note: the dictionary has 4 latents" in shown
    assert "is ready for core, tpp" in shown


def test_the_commands_of_the_page_parse():
    page = (Path(__file__).parent.parent / "docs" / "saebench.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("python -m evaluate saebench ")]
    assert lines
    for line in lines:
        get_command(app).make_context("saebench", line.split()[4:])


def test_our_columns_with_saebench_names_exist():
    columns = {"core": core.COLUMNS, "first_letter": first_letter.COLUMNS, "probing": probing.COLUMNS}
    ours = {metric: {c for names in found.values() for c in names.values()} for metric, found in SAEBENCH.items()}
    asked_by_them_alone = {f"sae_top_{k}_test_accuracy" for k in (10, 20, 50, 100)}
    for metric, names in ours.items():
        assert names - asked_by_them_alone <= set(columns[metric])


def test_numbers_are_nested_as_saebench_does():
    numbers = {
        "core": {"l0": 3.0, "frac_alive": 0.5, "mse_masked": 1.0},
        "first_letter": {"first_letter_mean_full_absorption_score": 0.25},
        "probing": {"llm_test_accuracy": 0.9, "sae_top_5_test_accuracy": None},
    }
    assert nested(numbers) == {
        "sparsity": {"l0": 3.0},
        "misc_metrics": {"frac_alive": 0.5},
        "mean": {"mean_full_absorption_score": 0.25},
        "llm": {"llm_test_accuracy": 0.9},
        "sae": {"sae_top_5_test_accuracy": None},
    }


needs_wheel = pytest.mark.skipif(not Path(WHEEL).is_file(), reason="SAEBENCH_WHEEL names no sae-bench 0.6.0 wheel")


def parsed(module: str) -> ast.Module:
    with zipfile.ZipFile(WHEEL) as wheel:
        return ast.parse(wheel.read(f"{module.replace('.', '/')}.py"))


def parameters(module: ast.Module, function: str) -> set[str]:
    found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return {argument.arg for argument in found[0].args.args}


def fields(module: ast.Module) -> dict[str, set[str]]:
    """Class -> its annotated fields."""
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    return {
        node.name: {f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}
        for node in classes
    }


@needs_wheel
@pytest.mark.parametrize("name", SCRIPTED)
def test_saebench_has_what_the_script_calls(name):
    module, config, told, run_told = SCRIPTED[name]
    positional = {"config", "selected_saes", "device", "output_path", "force_rerun"}
    assert positional | set(run_told) <= parameters(parsed(module), "run_eval")
    has = fields(parsed(module.replace(".main", ".eval_config")))[config]
    llm = set() if name == "sparse_probing_sae_probes" else {"llm_batch_size", "llm_dtype"}
    assert {"model_name", "random_seed", *llm, *told} <= has


@needs_wheel
def test_saebench_core_has_what_the_script_calls():
    has = parameters(parsed("sae_bench.evals.core.main"), "multiple_evals")
    assert {"selected_saes", "output_folder", "dtype", "device", "force_rerun", "verbose", *CORE} <= has


@needs_wheel
def test_our_names_of_saebench_are_its_own():
    homes = {"core": "core", "first_letter": "absorption", "probing": "sparse_probing"}
    for metric, sections in SAEBENCH.items():
        classes = fields(parsed(f"sae_bench.evals.{homes[metric]}.eval_output"))
        categories = next(found for name, found in classes.items() if name.endswith("MetricCategories"))
        assert set(sections) <= categories
        assert {name for names in sections.values() for name in names} <= set().union(*classes.values())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        *(({"name": name}, "name is .*SAEBench names files by it") for name in ("../../x", "/etc/x", "a/b", "..", "")),
        *(({"cache": cache}, r"cache\.") for cache in ({}, {"tl_name": 3}, {"model": None})),
        ({"name": None}, "name is None"),
    ],
)
def test_a_run_that_does_not_say_what_saebench_needs_is_refused(trained, tmp_path, changes, word):
    run = changed(trained / "batchtopk", tmp_path / "run", lambda W_dec: W_dec)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**without_seal(facts), **changes}))
    with pytest.raises(UserError, match=word):
        prepare(run, tmp_path / "out", model_name=PYTHIA)
    assert not (tmp_path / "out").exists()
