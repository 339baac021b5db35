"""Making a folder a cache: it resumes what is its own and touches nothing else."""

import dataclasses
import os
from pathlib import Path

import pytest
from cache_fixtures import make_cache, make_hook, make_plan, make_shard, scratch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_spec import (
    ActivationCache,
    CacheConflict,
    CacheDamaged,
    CacheIncomplete,
    CacheNotFound,
    CacheTooNew,
    UserError,
    create_cache,
    finalize_cache,
    write_shard,
)
from cache_spec.plan import SPEC_VERSION

PLAN = make_plan()


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def conflict(path: Path, plan, *words: str) -> None:
    """Creating is refused in one sentence with these words, and nothing is touched."""
    before = contents(path) if path.is_dir() else path.read_bytes()
    with pytest.raises(CacheConflict) as caught:
        create_cache(path, plan)
    assert "\n" not in str(caught.value)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert (contents(path) if path.is_dir() else path.read_bytes()) == before


def test_creating_twice_is_creating_once(tmp_path):
    create_cache(tmp_path / "cache", PLAN)
    before = contents(tmp_path / "cache")
    create_cache(tmp_path / "cache", PLAN)
    assert contents(tmp_path / "cache") == before


def test_a_finished_cache_stays_as_it_is(tmp_path):
    path = make_cache(tmp_path / "cache", PLAN)
    before = contents(path)
    create_cache(path, PLAN)
    assert contents(path) == before


def test_folders_above_are_made_and_an_empty_one_is_used(tmp_path):
    create_cache(tmp_path / "a/b/cache", PLAN)
    (tmp_path / "empty").mkdir()
    create_cache(tmp_path / "empty", PLAN)
    assert contents(tmp_path / "empty").keys() == contents(tmp_path / "a/b/cache").keys()


def test_the_planners_files_may_be_there_first(tmp_path):
    (tmp_path / "cache/_granary").mkdir(parents=True)
    (tmp_path / "cache/_granary/windows.npy").write_bytes(b"x")
    create_cache(tmp_path / "cache", PLAN)
    assert (tmp_path / "cache/_granary/windows.npy").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 5}, ["seed is 0 there and 5 here"]),
        ({"n_rows": 149, "seed": 5}, ["n_rows is 150 there and 149 here", "seed is 0"]),
        ({"model": {**PLAN.model, "revision": "main"}}, ["model.revision is '0' there and 'main' here"]),
        ({"hooks": (make_hook(1, 7),)}, ["hooks[0].d_model is 6 there and 7 here"]),
        ({"hooks": (make_hook(1, 6), make_hook(2, 6))}, ["hooks is"]),
        ({"source": {"id": "made-up text", "revision": "0"}}, ["source.n_documents is 150 there and None here"]),
    ],
)
def test_another_plan_is_a_conflict_that_names_the_facts(tmp_path, change, words):
    create_cache(tmp_path / "cache", PLAN)
    conflict(tmp_path / "cache", dataclasses.replace(PLAN, **change), *words)


def test_many_differences_are_cut_to_the_first_three(tmp_path):
    create_cache(tmp_path / "cache", PLAN)
    other = make_plan(n_rows=999, shard_rows=128, chunk_rows=32, d_model=9, seed=4)
    conflict(tmp_path / "cache", other, "n_rows", "n_train_rows", "shard_rows", "; ...")


@pytest.mark.parametrize("name", ["notes.txt", "zarr.json", "layer_1", ".git"])
def test_a_folder_with_something_else_is_a_conflict(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("{}")
    conflict(tmp_path / "mine", PLAN, f"'{name}'", "not empty")


def test_a_file_is_a_conflict(tmp_path):
    (tmp_path / "mine").write_text("precious")
    conflict(tmp_path / "mine", PLAN, "is a file")


def test_a_half_created_cache_goes_on_with_its_own_plan_only(tmp_path, monkeypatch):
    path, n_left, replace = tmp_path / "cache", [4], os.replace

    def die(source, target):
        if not n_left[0]:
            raise KeyboardInterrupt
        n_left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        create_cache(path, PLAN)
    monkeypatch.setattr(os, "replace", replace)
    assert not (path / "_granary/plan.json").exists()
    conflict(path, make_plan(seed=3), "half-created")
    make_cache(path, PLAN)
    assert ActivationCache.open(path).plan == PLAN


def test_a_plan_that_cannot_be_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match="chunk_rows"):
        create_cache(tmp_path / "cache", dataclasses.replace(PLAN, chunk_rows=7))
    assert not (tmp_path / "cache").exists()


def test_a_damaged_or_newer_plan_is_not_taken_for_another(tmp_path):
    create_cache(tmp_path / "cache", PLAN)
    plan = tmp_path / "cache/_granary/plan.json"
    text = plan.read_text()
    plan.write_text(text.replace(f'"{SPEC_VERSION}"', '"3.0"'))
    with pytest.raises(CacheTooNew):
        create_cache(tmp_path / "cache", PLAN)
    plan.write_text(text[:-5])
    with pytest.raises(CacheDamaged):
        create_cache(tmp_path / "cache", PLAN)


def test_software_does_not_name_the_content(tmp_path):
    path = make_cache(tmp_path / "cache", PLAN)
    assert ActivationCache.open(path).attributes["versions"].keys() >= {"python", "numpy"}
    assert "versions" not in (path / "_granary/plan.json").read_text()


@given(order=st.permutations(range(3)), stop=st.integers(0, 3))
@settings(max_examples=10)
def test_equal_plans_give_equal_trees_whatever_the_order_and_the_interruptions(order, stop):
    """Not one file tells who wrote it, when, or in how many goes."""
    with scratch() as folder:
        straight = make_cache(folder / "straight", PLAN)
        create_cache(folder / "other", PLAN)
        for i, shard in enumerate(order):
            if i == stop:
                finalize_cache(folder / "other", partial=True)
                create_cache(folder / "other", PLAN)
            write_shard(folder / "other", PLAN, shard, *make_shard(PLAN, shard))
        finalize_cache(folder / "other")
        assert contents(folder / "other") == contents(straight)


def test_closing_needs_all_shards_unless_it_is_closed_early(tmp_path):
    path = make_cache(tmp_path / "cache", PLAN, shards=range(2), finalize=False)
    with pytest.raises(CacheIncomplete, match="2 of 3"):
        finalize_cache(path)
    assert not (path / "_granary/manifest.json").exists()
    finalize_cache(path, partial=True)
    assert ActivationCache.open(path, allow_partial=True).status == "partial"


def test_closing_twice_is_closing_once(tmp_path):
    path = make_cache(tmp_path / "cache", PLAN)
    before = contents(path)
    finalize_cache(path)
    finalize_cache(path, partial=True)
    assert contents(path) == before


def test_closing_what_is_no_cache(tmp_path):
    with pytest.raises(CacheNotFound):
        finalize_cache(tmp_path)
    assert list(tmp_path.iterdir()) == []
