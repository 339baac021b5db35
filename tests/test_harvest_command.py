"""`python -m harvest` as a user meets it: defaults that work, one sentence on bad input, Ctrl-C and kill -9."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harvest_fixtures import save_model, write_text
from typer.testing import CliRunner

from cache_spec import ActivationCache, UserError, verify_cache
from harvest.__main__ import app
from harvest.model import FAMILIES, SHORT_NAMES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


def command(model, text, out, *more):
    """A harvest of 7 shards, slow because the model runs one short window at a time."""
    options = {
        "--model": model,
        "--dataset": text,
        "--layers": "1",
        "--tokens": "8k",
        "--context": "8",
        "--batch-windows": "1",
        "--out": out,
        "--scale-factor": "1",
    }
    return [str(part) for pair in options.items() for part in pair] + list(more)


def invoke(*arguments):
    """The command inside this process; a UserError is raised as it is."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def interrupt(arguments, wanted_shards, how):
    """Start the command, wait for some shards, stop it by a signal; returns its exit code and what it printed."""
    out = Path(arguments[arguments.index("--out") + 1])
    with subprocess.Popen(
        [sys.executable, "-m", "harvest", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    ) as process:
        try:
            while len(list((out / "_granary" / "shards").glob("*.json"))) < wanted_shards:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.02)
            process.send_signal(how)
            return process.wait(timeout=60), process.communicate()[0]
        finally:
            process.kill()


def files_of(cache):
    """Every file that the plan decides, and its bytes."""
    kept = ("layer_1", "rows", "_granary")
    own = ("shards", "manifest.json", "lock")
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for folder in kept
        for path in sorted((cache / folder).rglob("*"))
        if path.is_file() and not any(part in own for part in path.parts)
    }


def test_the_embedded_model_needs_no_options(tmp_path):
    said = invoke("--model", "tiny", "--tokens", "20k", "--out", tmp_path / "cache")
    cache = ActivationCache.open(tmp_path / "cache")
    assert "complete" in said
    assert "tokens/s" in said
    assert [variant.name for variant in cache.plan.variants] == ["clean", "masked"]
    assert (cache.plan.source["id"], cache.plan.window_tokens) == ("embedded", 64)
    assert len(cache.train_shards) >= 4
    assert len(cache.held_out_shards) >= 1
    assert list(verify_cache(tmp_path / "cache")) == []


def test_windows_of_the_embedded_text_are_its_documents(tmp_path):
    invoke("--model", "tiny", "--tokens", "8k", "--out", tmp_path / "cache")
    cache = ActivationCache.open(tmp_path / "cache")
    for shard in cache.shards:
        pairs = set(zip(cache.column("window", shard).tolist(), cache.column("doc", shard).tolist(), strict=True))
        assert len({window for window, _ in pairs}) == len({doc for _, doc in pairs}) == len(pairs)


def test_a_killed_and_an_interrupted_harvest_end_byte_for_byte_as_an_uninterrupted_one(model, text, tmp_path):
    arguments = command(model, text, tmp_path / "cut")
    code, said = interrupt(arguments, 1, signal.SIGINT)
    assert code == 130, said
    assert said.count("Ctrl-C") == 1
    assert re.search(
        r"error: stopped by Ctrl-C; .* \d of 7 shards are in .*; the same command goes on from shard \d\n", said
    )
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.partial"))
    n_before = len(ActivationCache.open(tmp_path / "cut", allow_partial=True).shards)
    code, said = interrupt(arguments, n_before + 1, signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    n_after = len(ActivationCache.open(tmp_path / "cut", allow_partial=True).shards)
    assert n_before + 1 <= n_after < 7
    invoke(*arguments)
    invoke(*command(model, text, tmp_path / "whole"))
    cut, whole = files_of(tmp_path / "cut"), files_of(tmp_path / "whole")
    assert len(whole) > 7 * 9
    assert cut == whole
    first, second = (ActivationCache.open(tmp_path / name) for name in ("cut", "whole"))
    assert first.plan.cache_id == second.plan.cache_id
    assert list(verify_cache(tmp_path / "cut")) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--model", "pythia"), "there is no model 'pythia' .short names: tiny"),
        (("--layers", "5"), "3 layers, numbered 0 to 2; there is no layer 5"),
        (("--layers", "attention"), "'attention' is not a hook point"),
        (("--mask-prob", "1.01"), "a probability must be from 0 to 1"),
        (("--mask-string", "w1w2"), "must be one token"),
        (("--tokens", "0"), "--tokens is '0'"),
        (("--tokens", "9M"), "the text is too short"),
        (("--dataset", "nowhere.txt"), r"no text at nowhere\.txt"),
        (("--out", "/proc/version"), "is a file"),
        (("--out", "/proc/version/cache/of/mine"), "/proc/version is a file, so there can be no /proc/version/cache"),
        (("--context", "1000"), "--context is 1000"),
        (("--device", "abacus"), "no device 'abacus'"),
        (("--dtype", "decimal"), "'decimal' is not a dtype"),
        (("--batch-windows", "-1"), "--batch-windows is -1"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(model, text, tmp_path, change, said):
    with pytest.raises(UserError, match=said) as caught:
        invoke(*command(model, text, tmp_path / "cache", *change))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_limit_on_the_size_of_files_is_one_sentence_and_leaves_no_half_file(model, text, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "harvest", *command(model, text, tmp_path / "cache")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert ended.returncode == 1
    assert re.fullmatch(r"error: File too large: .*; raise the limit .*", ended.stderr.splitlines()[-1])
    assert "Traceback" not in ended.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_help_explains_every_option_without_loading_torch():
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom harvest.__main__ import app\n"
        "print(CliRunner().invoke(app, ['--help']).output)\nassert 'torch' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    options = [line.strip() for line in said.splitlines() if line.strip().startswith("--")]
    assert len(options) >= 15
    assert all(len(line.split("  ")) > 1 or line.split()[1:] for line in options)


def test_the_help_names_every_family_and_short_name():
    said = " ".join(invoke_help().split())
    for name in (*FAMILIES, *SHORT_NAMES):
        assert re.search(rf"\b{name}\b", said), name


def invoke_help() -> str:
    return CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output


def test_a_dry_run_of_a_huge_harvest_is_quick_and_says_what_it_needs(model, text, tmp_path):
    said = invoke(*command(model, text, tmp_path / "cache", "--tokens", "10B", "--dry-run"))
    assert "GB needed" in said
    assert not list(tmp_path.iterdir())
