"""The harvest end to end: every row is the model's activation of its token, whatever happened on the way."""

import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from harvest_fixtures import random_documents, request_for, save_model, write_text
from pipeline_fixtures import files_of

from cache_spec import ActivationCache, CacheConflict, HookPoint, UserError, column_types, verify_cache
from cache_spec.files import exclusive
from cache_spec.layout import INTERNAL, LOCK, PLAN
from harvest import run, target
from harvest.masking import draw_mask
from harvest.model import activations, load_model
from harvest.shard import row_order, windows_of
from harvest.share import Share
from harvest.text import text_facts


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: load_model(str(save_model(tmp_path_factory.mktemp(name), name))) for name in ("gpt_neox", "gemma2")}


@pytest.fixture(scope="module")
def caches(tmp_path_factory, models, text):
    """A cache of each model, of two hook points and all three kinds of variant."""
    opened = {}
    for name, loaded in models.items():
        out = tmp_path_factory.mktemp("caches") / name
        run.harvest(loaded, request_for(loaded, text, layers="2,mlp_out.1", random_prob=0.1, context=48), out)
        opened[name] = ActivationCache.open(out)
    return opened


@pytest.fixture(params=["gpt_neox", "gemma2"])
def family(request):
    return request.param


def every(cache, column):
    return np.concatenate([cache.column(column, shard) for shard in cache.shards])


def test_a_harvest_is_complete_and_every_checksum_matches(caches, family):
    assert caches[family].status == "complete"
    assert list(verify_cache(caches[family].path)) == []


def test_every_row_is_the_activation_of_its_token_in_every_variant(caches, models, family):
    """Each window of the columns is run again, alone, and its rows are compared."""
    cache, loaded = caches[family], models[family]
    window, pos = every(cache, "window"), every(cache, "pos")
    for variant in cache.plan.variants:
        name = "token" if variant.name == "clean" else f"token_{variant.name}"
        tokens = np.full((window.max() + 1, cache.plan.window_tokens), loaded.tokenizer.eos_token_id)
        tokens[window, pos] = every(cache, name)  # a cut window lacks its end, which no earlier token sees
        for hook in cache.plan.hooks:
            point = HookPoint.parse(hook.hook_point)
            wanted = activations(loaded, torch.from_numpy(tokens), [point])[point][window, pos].numpy()
            stored = cache.read(hook.name, variant.name, np.arange(cache.plan.n_rows)).astype(np.float32)
            np.testing.assert_allclose(stored * hook.scale_factor, wanted, rtol=2e-3, atol=2e-3)


def test_each_token_of_each_window_is_one_row_and_held_out_rows_follow(caches, family):
    cache = caches[family]
    plan = cache.plan
    place = every(cache, "window").astype(np.int64) * plan.window_tokens + every(cache, "pos")
    train = np.arange(plan.n_train_rows)
    held_out = plan.n_train_windows * plan.window_tokens + np.arange(plan.n_rows - plan.n_train_rows)
    assert np.array_equal(np.sort(place[: plan.n_train_rows]), train)
    assert np.array_equal(np.sort(place[plan.n_train_rows :]), held_out)
    assert plan.n_train_rows % plan.window_tokens  # so the last train window is cut here
    doc = every(cache, "doc")
    assert not np.intersect1d(doc[: plan.n_train_rows], doc[plan.n_train_rows :]).size


def test_rows_are_shuffled_within_their_shard(caches, family):
    cache = caches[family]
    for shard in cache.shards:
        rank = np.argsort(np.argsort(cache.column("window", shard).astype(np.int64) * 100 + cache.column("pos", shard)))
        assert abs(np.corrcoef(rank, np.arange(len(rank)))[0, 1]) < 0.15
    assert not np.array_equal(row_order(cache.plan, 0), row_order(cache.plan, 1))


def test_columns_say_what_the_model_read(caches, models, family):
    cache, tokenizer = caches[family], models[family].tokenizer
    token, flags, mask = every(cache, "token"), every(cache, "flags"), every(cache, "mask")
    assert (flags & 1).all()
    assert np.array_equal(flags & 2 > 0, every(cache, "pos") == 0)
    assert np.array_equal(flags & 4 > 0, np.isin(token, tokenizer.all_special_ids))
    assert not (flags & 8).any()
    assert (token[flags & 2 > 0] == tokenizer.bos_token_id).all()
    masked, random = every(cache, "token_masked"), every(cache, "token_random")
    assert np.array_equal(masked, np.where(mask & 1, cache.plan.variants[1].mask_token, token))
    assert np.array_equal(random[mask & 2 == 0], token[mask & 2 == 0])
    assert not (mask[flags & 4 > 0]).any()
    ordinary = flags & 4 == 0
    assert abs((mask[ordinary] & 1).mean() - 0.3) < 0.03
    assert abs((mask[ordinary] & 2).mean() / 2 - 0.1) < 0.02


def test_the_mask_column_is_the_draw_of_its_window(caches, models, family):
    cache = caches[family]
    window, pos, mask = (every(cache, name) for name in ("window", "pos", "mask"))
    special = np.zeros((window.max() + 1, cache.plan.window_tokens), bool)
    special[window, pos] = every(cache, "flags") & 4 > 0
    draws = np.stack([draw_mask(cache.plan.seed, "masked", i, row, 0.3) for i, row in enumerate(special)])
    assert np.array_equal(draws[window, pos], mask & 1 > 0)


def test_the_windows_of_all_shards_cover_each_split_once(caches, family):
    plan = caches[family].plan
    rows = []
    for shard in range(plan.n_shards):
        numbers, skip = windows_of(plan, shard)
        start = int(numbers[0]) * plan.window_tokens + skip
        assert 0 <= skip < plan.window_tokens
        assert (len(numbers) - 1) * plan.window_tokens < skip + plan.rows_in(shard) <= len(numbers) * plan.window_tokens
        rows += range(start, start + plan.rows_in(shard))
    assert len(rows) == len(set(rows)) == plan.n_rows


def test_scaled_activations_are_stored_divided(models, text, tmp_path):
    loaded = models["gpt_neox"]
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    run.harvest(loaded, request_for(loaded, text), plain)
    run.harvest(loaded, request_for(loaded, text, scale_factor=8.0), scaled)
    first, second = (ActivationCache.open(path).activations("layer_1", "clean", 0) for path in (plain, scaled))
    np.testing.assert_allclose(second.astype(np.float32) * 8, first.astype(np.float32), rtol=1e-3, atol=1e-3)


def test_a_dry_run_prints_the_plan_and_writes_nothing(models, text, tmp_path, capsys):
    loaded = load_model(models["gemma2"].name, weights=False)
    run.harvest(loaded, request_for(loaded, text), tmp_path / "new" / "cache", dry_run=True)
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for fact in ("resid_post.1 (model.layers.1, 16 wide", "masked (p = 0.3", "5,120 to train on + 1,024 held out"):
        assert fact in said
    assert "needed" in said
    assert "free" in said


def test_the_same_command_makes_only_the_missing_shards(models, text, tmp_path, monkeypatch):
    loaded, whole, out = models["gemma2"], tmp_path / "whole", tmp_path / "cut"
    request = request_for(loaded, text)
    run.harvest(loaded, request, whole)
    real, made = target.write_shard, []

    def stopping(path, plan, shard, *arrays, **how):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(shard)
        return real(path, plan, shard, *arrays, **how)

    monkeypatch.setattr(target, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt) as caught:
        run.harvest(loaded, request, out)
    assert str(caught.value) == f"2 of 6 shards are in {out}; the same command goes on from shard 2"
    assert not list(out.rglob("*.partial"))
    monkeypatch.setattr(target, "write_shard", lambda *facts, **how: made.append(facts[2]) or real(*facts, **how))
    monkeypatch.setattr(run, "make_plan", None)  # the text is not read again
    run.harvest(loaded, request, out)
    assert made == [0, 1, 2, 3, 4, 5]
    assert files_of(out) == files_of(whole)
    run.harvest(loaded, request, out)
    assert len(made) == 6


def test_another_plan_is_refused_and_nothing_is_touched(models, text, tmp_path):
    loaded, out = models["gpt_neox"], tmp_path / "cache"
    run.harvest(loaded, request_for(loaded, text), out)
    before = files_of(out)
    with pytest.raises(CacheConflict, match=r"another plan \(--seed 0, not 1; --mask-prob 0.3, not 0.2\)"):
        run.harvest(loaded, request_for(loaded, text, seed=1, mask_prob=0.2), out)
    assert files_of(out) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_another_text_of_the_same_name_is_refused_while_it_is_there(models, tmp_path, kind):
    loaded, out = models["gpt_neox"], tmp_path / "cache"
    texts = [tmp_path / name / "text.txt" for name in ("first", "second")]
    for seed, file in enumerate(texts):
        file.parent.mkdir()
        if kind == "folder":
            file.mkdir()
        write_text(file / "a.txt" if kind == "folder" else file, 400, seed)
        if kind == "folder":
            write_jsonl(file / "b.jsonl", 400, seed)
    first, second = texts
    run.harvest(loaded, request_for(loaded, first), out)
    before = files_of(out)
    assert text_facts(str(first)).items() <= ActivationCache.open(out).plan.source.items()
    with pytest.raises(CacheConflict, match=r"another plan \(--dataset of [\d,]+ bytes, not of"):
        run.harvest(loaded, request_for(loaded, second), out)
    assert files_of(out) == before
    run.harvest(loaded, request_for(loaded, first), out)
    shutil.rmtree(first.parent)
    run.harvest(loaded, request_for(loaded, first), out)  # the tokens are in the cache


def write_jsonl(path, n_documents, seed):
    path.write_text("\n".join(json.dumps({"text": text}) for text in random_documents(n_documents, seed)))


def test_a_folder_that_holds_something_else_is_refused_before_the_text_is_read(models, text, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "make_plan", None)
    loaded, request = models["gpt_neox"], request_for(models["gpt_neox"], text)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CacheConflict, match=r"holds 'thesis.tex'"):
        run.harvest(loaded, request, tmp_path)
    with pytest.raises(CacheConflict, match="is a file"):
        run.harvest(loaded, request, tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("n_processes", [2, 3])
def test_several_processes_make_the_same_cache_as_one(models, text, tmp_path, capsys, n_processes):
    loaded = models["gpt_neox"]
    request = request_for(loaded, text)
    run.harvest(loaded, request, tmp_path / "alone")
    out = tmp_path / "shared"
    for index in reversed(range(n_processes)):
        assert not out.exists() or ActivationCache.open(out, allow_partial=True).status == "harvesting"
        capsys.readouterr()
        run.harvest(loaded, request, out, share=Share(index=index, count=n_processes, source="--shard"))
        there = ActivationCache.open(out, allow_partial=True).shards
        assert there == tuple(shard for shard in range(6) if shard % n_processes >= index)
        if index:
            assert (
                f"{len(there)} of 6 shards are in {out}; the other processes make the rest" in capsys.readouterr().out
            )
    assert "complete: 6,144 rows in 6 shards" in capsys.readouterr().out
    assert files_of(out) == files_of(tmp_path / "alone")


def test_a_resume_may_use_another_number_of_processes_and_batch_size(models, text, tmp_path):
    loaded = models["gpt_neox"]
    request = request_for(loaded, text)
    alone, out = tmp_path / "alone", tmp_path / "shared"
    run.harvest(loaded, request, alone)
    run.harvest(loaded, request, out, share=Share(index=1, count=4, source="--shard"), batch_windows=1)
    run.harvest(loaded, request, out, share=Share(index=0, count=2, source="--shard"), batch_windows=7)
    run.harvest(loaded, request, out, batch_windows=1000)
    one, other = ActivationCache.open(alone), ActivationCache.open(out)
    assert one.plan == other.plan
    for name in column_types(one.plan):
        assert np.array_equal(every(one, name), every(other, name)), name
    for shard in one.shards:
        for variant in one.plan.variants:
            a, b = (cache.activations("layer_1", variant.name, shard).astype(np.float32) for cache in (one, other))
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_more_processes_than_shards_have_nothing_to_do(models, text, tmp_path, capsys):
    loaded, out = models["gpt_neox"], tmp_path / "cache"
    run.harvest(loaded, request_for(loaded, text), out, share=Share(index=7, count=8, source="--shard"))
    assert f"0 of 6 shards are in {out}; the other processes make the rest" in capsys.readouterr().out


def test_one_process_plans_while_the_others_wait(models, text, tmp_path, capsys, monkeypatch):
    loaded, out = models["gpt_neox"], tmp_path / "cache"
    (out / INTERNAL).mkdir(parents=True)
    waiting = threading.Thread(target=run.harvest, args=(loaded, request_for(loaded, text), out))
    with exclusive(out / LOCK):
        waiting.start()
        until, said = time.monotonic() + 20, ""
        while "another process is planning this cache; waiting for it" not in said and time.monotonic() < until:
            said += capsys.readouterr().out
            time.sleep(0.01)
        assert time.monotonic() < until
        assert not (out / PLAN).exists()
        run.harvest(loaded, request_for(loaded, text), tmp_path / "other")  # stands for what the planner makes
        for name in ("windows.npy", "window_docs.npy", "shards", "plan.json"):
            (tmp_path / "other" / INTERNAL / name).rename(out / INTERNAL / name)
        for path in (tmp_path / "other").iterdir():
            if path.name != INTERNAL:
                path.rename(out / path.name)
        monkeypatch.setattr(run, "make_plan", None)  # and so it is not made again
    waiting.join()
    assert ActivationCache.open(out).status == "complete"


@pytest.mark.parametrize("there", ["", "new", "new/cache"])
def test_planning_that_fails_leaves_no_folder_behind(models, tmp_path, there):
    """Those that were there before stay."""
    loaded, text = models["gpt_neox"], write_text(tmp_path / "text.txt", 3)
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="the text is too short"):
        run.harvest(loaded, request_for(loaded, text), tmp_path / "new" / "cache")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_shard_that_another_process_has_made_in_the_meantime_is_not_made_again(models, text, tmp_path, monkeypatch):
    loaded, out, whole = models["gpt_neox"], tmp_path / "cache", tmp_path / "whole"
    request = request_for(loaded, text)
    run.harvest(loaded, request, whole)
    real, made = target.write_shard, []

    def write(path, plan, shard, *arrays, **how):
        made.append(shard)
        if shard == 0:
            real(path, plan, 4, *make_rows(whole, 4))
        return real(path, plan, shard, *arrays, **how)

    monkeypatch.setattr(target, "write_shard", write)
    run.harvest(loaded, request, out)
    assert made == [0, 1, 2, 3, 5]
    assert files_of(out) == files_of(whole)


def make_rows(path, shard):
    """A shard of a cache as `write_shard` takes it."""
    cache = ActivationCache.open(path)
    names = [(hook.name, variant.name) for hook in cache.plan.hooks for variant in cache.plan.variants]
    columns = {name: np.asarray(cache.column(name, shard)) for name in column_types(cache.plan)}
    return {name: np.asarray(cache.activations(*name, shard)) for name in names}, columns
