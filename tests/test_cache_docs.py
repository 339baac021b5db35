"""docs/cache-format.md is true: its examples run, and its tables are those of the code."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_origin, get_type_hints

import pytest
from cache_fixtures import make_cache, make_plan

import cache_spec
from cache_spec import ActivationCache, HookPlan, Plan, VariantPlan, column_types
from cache_spec.layout import activation_attributes, record_file
from cache_spec.plan import SPEC_VERSION

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/cache-format.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def table(first: str) -> dict[str, list[str]]:
    """The table whose first column has this heading: name -> the other cells."""
    match = re.search(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert match, f"no table of {first}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[1].splitlines()]
    return {cells[0].strip("`"): cells[1:] for cells in rows}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("docs") / "example.zarr", make_plan(d_model=8))


def test_the_python_examples_run_one_after_the_other(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    examples = blocks("python")
    assert len(examples) == 4
    names: dict = {}
    for example in examples:
        exec(compile(example, "docs/cache-format.md", "exec"), names)
    assert names["cache"].plan == make_plan(d_model=8)
    assert names["rows"].shape == (3, 8)
    assert names["tokens"].shape == (150,)
    assert names["stored"].shape == (150, 8)


def test_the_commands_run(path):
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(re.sub(r"(\w+)\.zarr", lambda name: str(path.with_name(name[0])), line))
        assert words[0] == "python"
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["diff", "-r", path, path.with_name("again.zarr")], check=True)


@pytest.mark.parametrize(
    ("heading", "kind"), [("plan field", Plan), ("hook field", HookPlan), ("variant field", VariantPlan)]
)
def test_the_fields_of_the_plan(heading, kind):
    plain = {name: get_origin(hint) or hint for name, hint in get_type_hints(kind).items()}
    types = {name: "list" if hint is tuple else hint.__name__ for name, hint in plain.items()}
    assert {name: cells[0] for name, cells in table(heading).items()} == types
    assert list(table(heading)) == [field.name for field in dataclasses.fields(kind)]


def test_the_file_of_the_plan_has_these_fields_and_the_id(path):
    facts = json.loads((path / "_granary/plan.json").read_bytes())
    assert list(facts) == [*table("plan field"), "cache_id"]


def test_the_columns():
    documented = {name: cells[0] for name, cells in table("column").items()}
    assert documented == {name: dtype.name for name, dtype in column_types(make_plan()).items()}


def test_the_flags():
    documented = {name: int(cells[0]) for name, cells in table("flag").items()}
    assert documented == {name: getattr(cache_spec, name) for name in cache_spec.__all__ if name.startswith("FLAG_")}


def test_the_attributes_of_an_activation_array():
    plan = make_plan()
    attributes = activation_attributes(plan, plan.hooks[0])
    names = [name for name in attributes if name != "granary"]
    assert list(table("attribute")) == names + [f"mmap.{name}" for name in attributes["granary"]["mmap"]]


def test_the_fields_of_a_record(path):
    record = json.loads((path / record_file(0)).read_bytes())
    assert list(table("record field")) == list(record)
    files = record["files"]
    assert list(table("file field")) == list(files["layer_1/clean/c/0/0"])
    assert list(files["rows/token/c/0"]) == ["bytes", "crc32c"]


def test_the_attributes_of_the_group_and_the_fields_of_the_manifest(path):
    root = json.loads((path / "zarr.json").read_bytes())
    assert list(table("group attribute")) == list(root["attributes"]["granary"])
    manifest = json.loads((path / "_granary/manifest.json").read_bytes())
    assert list(table("manifest field")) == list(manifest)
    assert manifest["shards"]["1"] == ActivationCache.open(path).records[1]


def test_the_tree_names_every_file_of_a_cache(path):
    (tree,) = blocks("text")
    patterns = [re.sub(r"layer_12", r"[^/]+", line.split()[0]) for line in tree.splitlines()[1:]]
    patterns = [p.replace("...", ".*").replace("/token/", "/[^/]+/").replace("<s>", r"\d+") for p in patterns]
    for file in path.rglob("*"):
        if file.is_file():
            name = file.relative_to(path).as_posix()
            assert any(re.fullmatch(pattern, name) for pattern in patterns), f"{name} is not in the tree"


def test_the_version_is_the_codes():
    assert TEXT.startswith(f"# The cache format, version {SPEC_VERSION}\n")
