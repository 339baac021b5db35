"""`python -m cache_spec`, as typed: what it prints, its exit code, and its one sentence on bad input."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cache_fixtures import make_cache, make_plan

from cache_spec import ActivationCache, cache_bytes, shard_files
from cache_spec.info import bytes_for_people, describe

ROOT = Path(__file__).parent.parent


def cache_spec(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "cache_spec", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("commands") / "cache", make_plan(layers=(1, 3)))


def test_info_says_what_a_cache_holds(path):
    done = cache_spec("info", path)
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "complete",
        "made-up",
        "layer_1 = resid_post.1",
        "layer_3",
        "d_model 6",
        "masked: each token replaced by '...' (token 7) with probability 0.3",
        "128 train + 22 held out",
        "3 of 3 committed",
        "mean and m2 of",
        f'zarr.open("{path}")["layer_1/clean"]',
    ):
        assert words in done.stdout


def test_info_on_an_unfinished_cache_says_how_much_is_there(tmp_path):
    plan = make_plan()
    path = make_cache(tmp_path / "cache", plan, shards=range(1), finalize=False)
    text = describe(ActivationCache.open(path, allow_partial=True))
    assert "1 of 3 committed" in text
    assert "harvesting" in text
    there = sum(shard_files(plan, 0).values())
    assert f"{bytes_for_people(there)} of {bytes_for_people(cache_bytes(plan))}" in text
    assert "allow_partial=True" in text


def test_info_shortens_hashes_and_leaves_out_what_is_empty(tmp_path):
    plan = replace(make_plan(), source={"id": "text", "revision": "", "sha256": "ab" * 32, "license": "x" * 99})
    text = describe(ActivationCache.open(make_cache(tmp_path / "cache", plan)))
    assert f"text, sha256 abababababab, license {'x' * 60}\n" in text


def test_info_shows_the_largest_true_value_of_any_shard(path):
    cache = ActivationCache.open(path)
    largest = max(
        abs(cache.activations("layer_1", variant, shard)).max()
        for variant in ("clean", "masked")
        for shard in cache.shards
    )
    assert f"largest value {float(largest):.4g}" in describe(cache)


def test_verify_says_that_a_cache_is_whole(path):
    done = cache_spec("verify", path)
    assert done.returncode == 0
    assert "is whole" in done.stdout
    assert "verify cache" in done.stderr


def test_verify_names_the_damaged_file_and_fails(tmp_path):
    path = make_cache(tmp_path / "cache", make_plan())
    file = path / "layer_1/masked/c/1/0"
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    done = cache_spec("verify", path)
    assert done.returncode == 1
    assert "damaged: layer_1/masked/c/1/0 fails its checksum in rows 64 to 79" in done.stdout
    assert re.search(r"^error: .*damaged in layer_1/masked/c/1/0", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_verify_fails_on_an_unfinished_cache(tmp_path):
    path = make_cache(tmp_path / "cache", make_plan(), shards=range(2), finalize=False)
    done = cache_spec("verify", path)
    assert done.returncode == 1
    assert "1 of 3 shards" in done.stderr


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_folder_that_is_no_cache_gets_one_sentence(tmp_path, command):
    done = cache_spec(command, tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path} is a folder but no activation cache")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["verify", "--help"]])
def test_help_explains(arguments):
    done = cache_spec(*arguments)
    assert done.returncode == 0
    assert "cache" in done.stdout


@pytest.mark.parametrize("arguments", [["info"], ["mend", "x"], ["verify", "x", "--fast"]])
def test_wrong_usage_is_refused(arguments):
    done = cache_spec(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (1.5e9, "1.5 GB"),
        (4.61e11, "461.0 GB"),
        (2.5e15, "2,500.0 TB"),
    ],
)
def test_bytes_for_people(n_bytes, text):
    assert bytes_for_people(n_bytes) == text


def test_opening_a_cache_imports_no_model_library():
    code = "import sys, cache_spec; print({'torch', 'transformers', 'datasets', 'zarr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
