"""The benchmark of a step: its table is made of what the contestants said, and its model of the counts beside it."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from contest_fixtures import TOY, toy_environment
from typer.testing import CliRunner

from benchmarks import contest
from benchmarks.jobs import describe, make_job, parse_kernels, parse_names, parse_shape
from benchmarks.model import ADAM_BYTES, Rates, bill, bill_in_words, floor_seconds
from benchmarks.peers.floors import N_COPIED
from benchmarks.step import app
from cache_spec.errors import UserError

SECONDS = {"five": 0.8, "encoder": 0.2, "copy": 0.1, "dense": 0.4, "": 2.0, "signum": 1.2}
ROUNDS = ["--rounds", "3", "--shape", "16,64,4,32", "--kernel", "dense"]


@pytest.fixture
def env(tmp_path, monkeypatch):
    """Everybody is a toy: floors, ours, and peers who name this environment."""
    folder = toy_environment(tmp_path / "env", SECONDS)
    monkeypatch.setattr(contest.sys, "executable", str(folder / "bin" / "python"))
    return folder


def test_the_table_has_every_contestant_and_its_ratios(env, tmp_path):
    (tmp_path / "checkout").mkdir()
    out = tmp_path / "out.json"
    options = ["--saelens", str(env), "--sparsify", str(env), "--dictionary-learning", str(tmp_path / "checkout")]
    done = CliRunner().invoke(app, [*ROUNDS, *options, "--arch", "batchtopk", "--json", str(out)])
    assert done.exit_code == 0, done.output
    rows = {(row["name"], row["job"]["precision"]): row for row in json.loads(out.read_text())["rows"]}
    assert {precision for _, precision in rows} == {"fp32", "bf16"}
    saelens, ours = rows["saelens", "bf16"], rows["granary dense", "bf16"]
    assert saelens["x_five"]["middle"] == pytest.approx(2.5)
    assert saelens["x_one"]["middle"] == pytest.approx(10)
    assert saelens["x_ours"] == {"middle": pytest.approx(5), "low": pytest.approx(5), "high": pytest.approx(5)}
    assert rows["sparsify signum", "fp32"]["x_ours"]["middle"] == pytest.approx(3)
    assert saelens["spread"]["middle"] == pytest.approx(2.0 * 4)  # two rounds of warming up, then the third to fifth
    assert ours["floor_seconds"] > 0
    assert "x_ours" not in rows["encoder product", "fp32"]
    printed = [line for line in done.output.splitlines() if line.startswith("dictionary_learning ")]
    assert len(printed) == 2
    assert all(line.split()[1] == "8000.0" for line in printed)
    assert "not here  saev: name where they are with --saev" in done.output


def test_rates_are_those_of_the_floors(env, tmp_path):
    out = tmp_path / "out.json"
    done = CliRunner().invoke(app, [*ROUNDS, "--arch", "topk", "--precision", "fp32", "--json", str(out)])
    assert done.exit_code == 0, done.output
    row = next(row for row in json.loads(out.read_text())["rows"] if row["name"] == "granary dense")
    rates = Rates(2 * 32 * 16 * 64 / (4 * SECONDS["encoder"]), 2 * N_COPIED / (4 * SECONDS["copy"]))
    assert row["floor_seconds"] == pytest.approx(floor_seconds(TOY, "dense", rates))
    assert bill_in_words(TOY, "dense", rates) in done.output


def test_jumprelu_is_left_out_aloud_with_dead_latents(env):
    done = CliRunner().invoke(app, [*ROUNDS, "--arch", "topk,jumprelu", "--precision", "fp32", "--dead", "0.25"])
    assert "left out: jumprelu, which has no AuxK" in done.output
    assert "batch 32, 25% dead" in done.output


def test_without_a_floor_there_is_no_table(env):
    (env / "bin" / "python").write_text("#!/bin/sh\necho no such processor >&2\nexit 7\n")
    done = CliRunner().invoke(app, [*ROUNDS, "--arch", "topk"])
    assert str(done.exception) == (
        "five dense products: its process ended with code 7 and the words 'no such processor'"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "512,8192,32"], "give d_model,d_sae,k,batch"),
        (["--shape", "4,8,16,2"], "with k 16 above d_sae 8"),
        (["--arch", "gated"], "--arch gated is unknown; it is one of topk, batchtopk, matryoshka, jumprelu"),
        (["--precision", "fp8"], "--precision fp8 is unknown; it is one of fp32, bf16"),
        (["--kernel", "fast"], "--kernel fast is unknown"),
        (["--saelens", "no/where"], "no/where is no folder"),
    ],
)
def test_a_wrong_option_is_one_sentence(options, words):
    done = CliRunner().invoke(app, options)
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)


def test_options_are_read():
    assert parse_shape(" 512, 8192,32,2048") == (512, 8192, 32, 2048)
    assert parse_names("--arch", "a, b,", ("b", "a")) == ["a", "b"]
    assert "dense" in parse_kernels("", "cpu")
    assert "triton" not in parse_kernels("", "cpu")
    job = make_job("topk", "512,8192,32,2048", "bf16", "cpu", dead=0.1)
    assert describe(job) == "topk, bf16: d_model 512, d_sae 8192, k 32, batch 2048, 10% dead"
    assert job.lr < make_job("topk", "512,8192,32,2048", "bf16", "cpu").lr


def test_the_model_counts_what_the_kernels_must_do():
    job = make_job("topk", "512,8192,32,2048", "fp32", "cpu")
    dense, sparse, triton = (bill(job, kernel) for kernel in ("dense", "sparse", "triton"))
    product = 2 * 2048 * 512 * 8192
    assert sum(part.operations for part in dense) == 5 * product
    assert sum(part.operations for part in sparse) == product + 8 * 2048 * 32 * 512
    assert sum(part.operations for part in triton) == sum(part.operations for part in sparse)
    # what triton never writes are the pre-activations
    saved = sum(part.bytes for part in sparse) - sum(part.bytes for part in triton)
    assert saved == 2 * 4 * 2048 * 8192
    adam = next(part for part in sparse if part.name == "Adam")
    assert adam.bytes == ADAM_BYTES * 2 * 512 * 8192


def test_the_model_charges_for_dead_latents_and_for_each_active_one():
    job, rates = make_job("topk", "512,8192,32,2048", "bf16", "cpu"), Rates(1e12, 1e10)
    dead = replace(job, dead=0.1)
    assert floor_seconds(dead, "sparse", rates) - floor_seconds(job, "sparse", rates) == pytest.approx(
        8 * 2048 * 512 * 819 / 1e12
    )
    steps = [floor_seconds(replace(job, k=k), "sparse", rates) for k in (32, 64, 96)]
    assert steps[2] - steps[1] == pytest.approx(steps[1] - steps[0])
    assert steps[1] > steps[0]
    assert "AuxK" in bill_in_words(dead, "sparse", rates)
    assert "AuxK" not in bill_in_words(job, "sparse", rates)


def test_every_peer_is_a_file():
    folder = Path(contest.__file__).parent / "peers"
    assert {path.stem for path in folder.glob("*.py")} >= {"dictionary_learning", "saelens", "sparsify", "saev"}


def test_the_page_on_performance_names_what_there_is():
    text = (Path(contest.__file__).parent.parent / "docs" / "performance.md").read_text()
    modules = set(re.findall(r"benchmarks\.(\w+)", text))
    assert {"step", "sweep", "end_to_end"} <= modules
    for module in modules:
        command = typer.main.get_command(importlib.import_module(f"benchmarks.{module}").app)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for line in re.findall(rf"-m benchmarks\.{module}\b((?:[^\n`]|\\\n)*)", text.replace("--help", "")):
            assert set(re.findall(r"--[a-z-]+", line)) - {"--"} <= known | {"---"}, line
