"""docs/formats.md: its commands do what they say, its tables are the code's, its examples are Python."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from train_fixtures import DATA, make_training_cache, run_config
from typer.main import get_command
from typer.testing import CliRunner

from evaluate.__main__ import app as evaluate
from train.__main__ import OTHERS
from train.commands.export import app as export
from train.commands.importing import app as importing
from train.formats.dictionary_learning import CLASSES
from train.loader import MixedBatchLoader
from train.names import available
from train.sweep import train_sweep

PAGE = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the runs that the commands name, at the layer they name."""
    folder = tmp_path_factory.mktemp("docs")
    cache = make_training_cache(folder / "cache", layers=(2,))
    names = ["topk_d256_k6_seed0", "batchtopk_d256_k6_seed0"]
    runs = [run_config(name.partition("_")[0], name=name, d_sae=256, k=6) for name in names]
    short = {"hook": "layer_2", "n_tokens": 32 * 4}
    train_sweep(MixedBatchLoader(cache, DATA.__class__(**{**vars(DATA), **short})), runs, out=folder / "runs")
    return folder


def test_its_commands_do_what_they_say(place, monkeypatch):
    monkeypatch.chdir(place)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line]
    for line in lines:
        words = shlex.split(line)[3:]
        if words[0] in OTHERS:
            done = CliRunner().invoke({"export": export, "import": importing}[words[0]], words[1:])
            assert done.exit_code == 0, f"{line}: {done.exception}"
        else:
            get_command(evaluate).make_context("evaluate", words)
    assert (place / "exported" / "sparsify" / "layers.2" / "sae.safetensors").exists()
    assert (place / "imported" / "topk" / "sae_weights.safetensors").exists()


def test_every_architecture_and_class_has_its_line():
    trained_as = PAGE.split("| trained as |")[1].split("\n\n")[0]
    for name in available("architectures"):
        assert f"`{name}`" in trained_as
    keys = PAGE.split("| `dict_class` |")[1].split("\n\n")[0]
    for name, made in CLASSES.items():
        if name != "AutoEncoderNew":  # read, never written
            line = next(line for line in keys.splitlines() if f"`{name}`" in line)
            assert all(f"`{tensor}`" in line for tensor in made.tensors)


def test_its_examples_are_python():
    assert len(blocks("python")) == len(available("formats"))
    for block in blocks("python"):
        ast.parse(block)
