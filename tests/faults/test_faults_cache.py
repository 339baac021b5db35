"""Damage to a cache: verify finds every bit, no reader takes it for data, and what the sentence says mends it."""

import errno
import json
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from cache_fixtures import scratch
from damage import DAMAGE, damaged, kinds, refusal, swapped
from harvest_fixtures import request_for, save_model, write_text
from stages import contents_of
from typer.testing import CliRunner

from cache_spec import ActivationCache, CacheDamaged, CacheError, column_types, derive_seed
from cache_spec.__main__ import app as cache_app
from cache_spec.files import sync_folder
from harvest import run
from harvest.model import load_model
from train.__main__ import app as train_app

WORDS = ("--arch", "topk", "--k", "3", "--d-sae", "32", "--masked-fraction", "0.5", "--batch-size", "32")


@pytest.fixture(scope="module")
def harvest(tmp_path_factory):
    """The harvest of a small model, as a function of where to."""
    folder = tmp_path_factory.mktemp("inputs")
    loaded = load_model(str(save_model(folder / "model")))
    request = request_for(loaded, write_text(folder / "text.txt", 400))
    return lambda out: run.harvest(loaded, request, out)


@pytest.fixture(scope="module")
def cache(harvest):
    """A whole cache; every test leaves it as it was."""
    with scratch() as folder:
        harvest(folder / "cache")
        yield folder / "cache"


def verify(cache: Path) -> None:
    cache_app(["verify", str(cache)], standalone_mode=False)


def train(cache: Path, out: Path) -> None:
    train_app(["--cache", str(cache), "--out", str(out), "--tokens", "640", *WORDS], standalone_mode=False)


def everything(cache: Path) -> list[bytes]:
    """All that readers get, of activations, columns and moments."""
    opened = ActivationCache.open(cache)
    names = [(hook.name, variant.name) for hook in opened.plan.hooks for variant in opened.plan.variants]
    found = [opened.activations(*name, shard).tobytes() for name in names for shard in opened.shards]
    found += [opened.column(name, shard).tobytes() for name in column_types(opened.plan) for shard in opened.shards]
    return found + [opened.moments(*name).mean.tobytes() for name in names]


def read_or_refused(cache: Path, whole: list[bytes], path: Path) -> str:
    """What readers make of a cache with one damaged file: never other rows."""
    refused = ""
    try:
        found = everything(cache)
    except CacheError as error:
        found, refused = whole, str(error)
    assert found == whole, f"a reader takes {path} for whole"
    assert not refused or path.name in refused or str(cache) in refused, refused
    return "verify and readers refuse it by name" if refused else "verify says so; the rows are as they were"


@pytest.mark.parametrize("how", DAMAGE)
def test_verify_finds_it_in_every_kind_of_file(how, cache, n_kills, tally, capsys):
    rng = random.Random(derive_seed("tests/faults", how))
    outcomes, whole = Counter(), everything(cache)
    for paths in kinds(cache).values():
        for _ in range(max(2, n_kills // 50)):
            path = rng.choice(paths)
            with damaged(path, DAMAGE[how], rng):
                said = refusal(lambda: verify(cache), path, names=(path.relative_to(cache).as_posix(), str(cache)))
                assert said or (how != "gone" and path.name == "lock"), f"verify takes {path} for whole"
                outcomes[read_or_refused(cache, whole, path)] += 1
    verify(cache)
    tally(f"cache: {how}, in {len(kinds(cache))} kinds of file", "verify, readers", outcomes)


@pytest.mark.parametrize("how", ["a flipped bit", "cut short"])
def test_training_refuses_it_or_ends_with_the_same_bytes(how, cache, tally, tmp_path):
    rng = random.Random(derive_seed("tests/faults/train", how))
    train(cache, tmp_path / "whole")
    outcomes = Counter()
    for i, paths in enumerate(kinds(cache).values()):
        path = rng.choice(paths)
        with damaged(path, DAMAGE[how], rng):
            if refusal(lambda out=tmp_path / str(i): train(cache, out), path):
                outcomes["one sentence"] += 1
                assert not (tmp_path / str(i)).exists(), "something was written"
            else:
                assert contents_of(tmp_path / str(i)) == contents_of(tmp_path / "whole"), path
                outcomes["not read for it, the same bytes"] += 1
    tally(f"cache: {how}", "train", outcomes)


def test_what_the_sentence_says_mends_it(cache, harvest, tally):
    """Delete the named file, or the record, and run the same harvest: every byte is as it was."""
    wanted, outcomes = contents_of(cache), Counter()
    rng = random.Random(derive_seed("tests/faults/mend"))
    for kind, paths in kinds(cache).items():
        path = rng.choice(paths)
        with scratch() as folder, damaged(path, DAMAGE["a flipped bit"], rng):
            shutil.copytree(cache, folder / "cache")
            said = refusal(lambda at=folder / "cache": verify(at), path) or refusal(
                lambda at=folder / "cache": harvest(at), path
            )
            advice = re.search(r"delete (?:its record in )?(\S+?)/? and run", said)
            if advice is None:
                assert "a copy" in said, said
                outcomes["only a copy can mend it, which is said"] += 1
                continue
            place = folder / "cache" / advice[1]
            if "record in" in said:
                shard = re.findall(r"/(?:c|shards)/(\d+)", path.as_posix())[-1]
                place = folder / "cache" / "_granary" / "shards" / f"{int(shard):06d}.json"
            place.unlink()
            harvest(folder / "cache")
            found = contents_of(folder / "cache")
            assert found == wanted, (kind, [name for name in wanted if found.get(name) != wanted[name]])
            outcomes["deleted what it named, harvested, the same bytes"] += 1
    tally("cache: a flipped bit, then what the sentence says", "harvest", outcomes)


def test_files_that_changed_places_are_refused(cache, tally, tmp_path):
    """Of two shards, and of clean and masked: same names, same sizes, sound checksums of their own."""
    outcomes = Counter()
    for kind, paths in kinds(cache).items():
        if "#" not in kind or len(paths) < 2 or paths[0].read_bytes() == paths[1].read_bytes():
            continue
        with swapped(paths[0], paths[1]):
            assert refusal(lambda: verify(cache), paths[0], names=(kind.replace("#", "0", 1),)), kind
            with pytest.raises(CacheError):
                everything(cache)
            outcomes["refused by name"] += 1
    clean = next(path for path in cache.rglob("*/clean/c/0/0"))
    with swapped(clean, Path(str(clean).replace("/clean/", "/masked/"))):
        assert refusal(lambda: train(cache, tmp_path / "runs"), clean)
        outcomes["refused by name"] += 1
    assert sum(outcomes.values()) >= 5
    tally("cache: two shards swapped, two variants swapped", "verify, readers, train", outcomes)


def leaves(value: object, place: tuple = ()) -> list[tuple]:
    """The places of all single facts in a JSON value."""
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, each in inside for leaf in leaves(each, (*place, key))]
    return [place]


def test_a_plan_edited_by_hand_is_refused_whatever_was_edited(cache, harvest, tally, tmp_path):
    plan = cache / "_granary/plan.json"
    facts, outcomes, rng = json.loads(plan.read_text()), Counter(), random.Random(0)
    for place in leaves(facts):
        edited = json.loads(plan.read_text())
        inside = edited
        for key in place[:-1]:
            inside = inside[key]
        old = inside[place[-1]]
        inside[place[-1]] = old + 1 if isinstance(old, int | float) else f"{old}x"
        with damaged(plan, lambda data, rng, edited=edited: (json.dumps(edited, indent=1) + "\n").encode(), rng):
            for command in (verify, everything, harvest):
                with pytest.raises(CacheError) as caught:
                    command(cache)
                assert "plan.json" in str(caught.value) or "zarr.json" in str(caught.value), caught.value
        outcomes["refused by name"] += 1
    tally("cache: a fact of the plan edited by hand", "verify, readers, harvest", outcomes)


def test_a_missing_record_of_a_complete_cache_is_named_and_made_again(cache, harvest):
    record = cache / "_granary/shards/000002.json"
    with damaged(record, DAMAGE["gone"], random.Random(0)):
        with pytest.raises(CacheDamaged, match=r"has lost _granary/shards/000002.json; run the same harvest"):
            ActivationCache.open(cache)
        assert CliRunner().invoke(cache_app, ["verify", str(cache)]).exit_code


def test_a_folder_whose_names_cannot_be_written_down_is_named(tmp_path, monkeypatch):
    """The system names no file for a descriptor, and without a name there is no sentence."""

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        sync_folder(tmp_path)
    assert caught.value.filename == str(tmp_path)
