"""`python -m harvest` as a user meets it: defaults that work, one sentence on bad input, Ctrl-C, and the forecast."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harvest_fixtures import make_tokenizer, save_model, write_text
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from cache_spec import ActivationCache, UserError, verify_cache
from harvest.__main__ import app
from harvest.hub_name import PRESETS
from harvest.model import ATTENTION, DTYPES, SHORT_NAMES
from harvest.options import MASK_KINDS

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
    """Every file of a cache and its bytes; the lock has none."""
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def lines_of(said):
    """What was announced, by the first word of each line."""
    return {line[:10].strip(): line[10:] for line in said.splitlines()}


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


def test_an_interrupted_command_goes_on_and_ends_byte_for_byte_as_an_uninterrupted_one(model, text, tmp_path):
    arguments = command(model, text, tmp_path / "cut")
    code, said = interrupt(arguments, 1, signal.SIGINT)
    assert code == 130, said
    assert re.search(
        r"error: stopped by Ctrl-C .* \d of 7 shards are in .*; the same command goes on from shard \d\n",
        said,
    )
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.partial"))
    assert 1 <= len(ActivationCache.open(tmp_path / "cut", allow_partial=True).shards) < 7
    invoke(*arguments)
    invoke(*command(model, text, tmp_path / "whole"))
    cut, whole = files_of(tmp_path / "cut"), files_of(tmp_path / "whole")
    assert len(whole) > 7 * 9
    assert cut == whole
    assert list(verify_cache(tmp_path / "cut")) == []


def test_shares_make_the_cache_that_one_process_makes(model, text, tmp_path, monkeypatch):
    fast = ("--batch-windows", "64")
    invoke(*command(model, text, tmp_path / "whole", *fast))
    shared = command(model, text, tmp_path / "shared", *fast)
    said = invoke(*shared, "--shard", "1/2")
    assert "this process is 1/2 (--shard) and makes 3 of them" in lines_of(said)["shards"]
    assert ActivationCache.open(tmp_path / "shared", allow_partial=True).shards == (1, 3, 5)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")  # a resume may use another number
    said = invoke(*shared)
    assert "4 missing; this process is 0/3 (RANK and WORLD_SIZE) and begins with 2 of them" in lines_of(said)["shards"]
    assert "complete" in said  # the others never came
    assert "complete" in invoke(*shared, "--shard", "0/1")
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "whole")


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
        (("--shard", "2/2"), "--shard is '2/2'; give i/n with i from 0 to n - 1"),
        (("--mask-prob", "0.3,often"), "--mask-prob is '0.3,often'"),
        (("--mask-unit", "letter"), "--mask-unit is 'letter'; give token or word"),
        (("--random-prob", "-1"), "--random-prob is -1"),
        (("--attention", "divided"), "divided"),
        (("--held-out", "2"), "--held-out is 2.0"),
        (("--scale-factor", "5"), "--scale-factor is 5"),
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
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_the_help_explains_every_option_without_loading_torch():
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom harvest.__main__ import app\n"
        "print(CliRunner().invoke(app, ['--help']).output)\nassert 'torch' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    options = [line.strip() for line in said.splitlines() if line.strip().startswith("--")]
    assert len(options) >= 15
    assert all(len(line.split("  ")) > 1 or line.split()[1:] for line in options)


def test_the_help_names_every_short_name_every_data_set_and_every_choice():
    said = " ".join(invoke_help().split())
    for name in (*SHORT_NAMES, *PRESETS, *DTYPES, *ATTENTION, *MASK_KINDS):
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", said), name


def invoke_help() -> str:
    return CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output


@pytest.mark.parametrize("module", [b"typer", b"numpy"])
def test_ctrl_c_in_the_first_second_leaves_no_traceback(module, model, text, tmp_path):
    """While Python still imports what the command itself needs."""
    arguments = [sys.executable, "-X", "importtime", "-m", "harvest", *command(model, text, tmp_path / "cache")]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert any(module in line for line in process.stderr)  # one line for each import that is done
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode in (-signal.SIGINT, 130), errors
    assert b"Traceback" not in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_ctrl_c_while_the_libraries_are_imported_is_one_sentence(module, model, text, tmp_path):
    """The signal comes exactly when the module is looked for."""
    program = (
        "import os, signal, sys\nfrom cache_spec.command import run_command\nfrom harvest.__main__ import app\n"
        "class Interrupting:\n"
        "    def find_spec(name, path, target=None):\n"
        f"        if name == '{module}': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting)\nrun_command(app)"
    )
    arguments = command(model, text, tmp_path / "cache")
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr == "error: stopped by Ctrl-C or a signal; what was finished is kept\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("module", "inside"), [("torch", "torch.functional"), ("plistlib", "xml.parsers")])
def test_a_signal_never_raises_inside_of_what_is_imported(module, inside, number):
    """torch and others are set up by C++ that calls Python, and an exception there aborts the process (1 in 80 did)."""
    program = (
        "import os, signal, sys, time\nfrom cache_spec.command import run_command\n"
        "class Interrupting:\n"
        "    def find_spec(name, path, target=None):\n"
        "        try:\n"
        f"            if name == '{inside}': os.kill(os.getpid(), {number}), time.sleep(0.2)\n"
        "        except BaseException: os.abort()\n"
        f"def command(): __import__('{module}'), print('imported', flush=True), time.sleep(60)\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "sys.meta_path.insert(0, Interrupting)\nrun_command(command)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr == "error: stopped by Ctrl-C or a signal; what was finished is kept\n"


def test_a_command_that_is_run_by_an_import_heeds_signals_too(tmp_path):
    lines = ("import os, signal, time", "from cache_spec.command import run_command", "def command():")
    lines += ("    os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)", "run_command(command)")
    (tmp_path / "imported.py").write_text("\n".join(lines))
    program = f"import sys; sys.path.insert(0, '{tmp_path}'); import imported"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, timeout=30)
    assert ended.returncode == 130, ended.stderr


def test_a_wrong_option_is_refused_before_torch_is_imported():
    program = "import sys\nfrom harvest.__main__ import app\napp(standalone_mode=False)"
    wrong = [("--mask-prob", "2"), ("--layers", "middle"), ("--tokens", "none"), ("--shard", "1/1")]
    for option, value in wrong:
        ended = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", program, "--model", "tiny", "--out", "x", option, value],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"UserError: {'' if option == '--layers' else option}" in ended.stderr
        assert not re.search(r"\| +(torch|transformers)$", ended.stderr, re.MULTILINE)


def test_a_dry_run_loads_the_model_and_says_what_a_huge_harvest_takes(model, text, tmp_path):
    said = invoke(*command(model, text, tmp_path / "cache", "--tokens", "10B", "--dry-run", "--batch-windows", "64"))
    lines = lines_of(said)
    assert " TB needed, " in lines["disk"]
    assert re.fullmatch(r"expected time .* at [\d,.]+ tokens/s on cpu", lines["time"])
    n_rows = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]+", lines["rows"])]
    assert sum(n_rows) == pytest.approx(10e9, rel=0.001)
    assert "the text was not read, and nothing was written" in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_on_an_unfinished_and_on_a_finished_cache_says_what_is_left(model, text, tmp_path):
    arguments = command(model, text, tmp_path / "cache", "--batch-windows", "64")
    invoke(*arguments, "--shard", "0/2")
    before = files_of(tmp_path / "cache")
    lines = lines_of(invoke(*arguments, "--dry-run"))
    assert lines["shards"] == "7 of 1,024 rows: 4 there, 3 missing"
    written = sum(len(data) for name, data in before.items() if not name.startswith(("_granary", "zarr.json")))
    needed = float(lines["disk"].split(" kB needed")[0]) * 1000
    assert needed == pytest.approx(written * 3 / 4, rel=0.05)
    assert files_of(tmp_path / "cache") == before
    invoke(*arguments)
    lines = lines_of(invoke(*arguments, "--dry-run"))
    assert lines["shards"] == "7 of 1,024 rows: 7 there, 0 missing"
    assert lines["disk"].startswith("0 bytes needed, ")
    assert lines["time"] == "nothing left to do"


def test_the_cache_of_the_paper_is_announced_to_one_percent(tmp_path):
    """100 M tokens of a model 2304 wide, clean and masked: 100e6 x 2304 x 2 bytes x 2 = 0.92 TB."""
    tokenizer = make_tokenizer("llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2304,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ("--model", tmp_path / "model", "--layers", "0", "--tokens", "100M", "--dry-run")
    disk = lines_of(invoke(*arguments, "--out", tmp_path / "cache"))["disk"]
    for said in (r"^([\d.]+) TB needed, ", r", ([\d.]+) TB when whole$"):
        found = re.search(said, disk)
        assert found is not None, disk
        assert float(found[1]) == pytest.approx(0.9216, rel=0.01)
    assert not (tmp_path / "cache").exists()


def test_each_process_of_a_machine_asks_for_its_own_gpu(model, text, tmp_path, monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "5")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="there is no device 'cuda:5' here"):
        invoke(*command(model, text, tmp_path / "cache", "--device", "cuda"))
