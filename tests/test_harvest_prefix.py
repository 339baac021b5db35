"""The reuse of beginnings: fewer tokens, the same cache."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from harvest_fixtures import request_for, save_model, write_text
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as any_array
from pipeline_fixtures import ExactReader, collector, small_job

from cache_spec import ActivationCache
from harvest import run
from harvest.model import load_model
from harvest.pipeline import Job, batches_of, make_shards
from harvest.prefix import NEVER, WORTH, choose_batches, reusing_batches, saved_share, whole_batches
from harvest.reader import open_reader
from harvest.shard import prepare_shard

WINDOW = 64


def first_positions(p, n_windows=40, n_variants=2, seed=0):
    """What masks of probability p lead to: the clean variant has no replaced position."""
    masks = np.random.default_rng(seed).random((n_variants, n_windows, WINDOW)) < p
    masks[0], masks[:, :, 0] = False, False
    return np.where(masks.any(axis=2), masks.argmax(axis=2), WINDOW)


def rows_of(call, first):
    return {(variant, window): call.start for variant in call.variants for window in call.windows.tolist()}


@given(
    first=st.integers(1, 4).flatmap(
        lambda n: any_array(np.int64, (n, 17), elements=st.integers(1, WINDOW)).map(
            lambda a: np.concatenate([np.full((1, 17), WINDOW), a])
        )
    ),
    batch_windows=st.integers(1, 20),
)
def test_every_position_that_differs_is_run_once_and_only_with_what_it_goes_on_from(first, batch_windows):
    seen = {}
    for batch in reusing_batches(first, WINDOW, batch_windows):
        clean, *others = batch
        assert (clean.variants, clean.start) == ((0,), 0)
        assert len(clean.windows) <= batch_windows
        for call in batch:
            assert not seen.keys() & rows_of(call, first).keys()
            seen |= rows_of(call, first)
        for call in others:
            assert np.array_equal(clean.windows[call.kept], call.windows)
            assert call.start <= first[call.variants[0], call.windows].min()
    for variant, window in np.ndindex(first.shape):
        if variant == 0:
            assert seen[0, window] == 0
        elif first[variant, window] < WINDOW:
            assert seen[variant, window] <= first[variant, window]
        else:
            assert (variant, window) not in seen


@pytest.mark.parametrize("batch_windows", [1, 3, 40, 100])
def test_whole_batches_run_every_window_in_every_variant_once(batch_windows):
    first = first_positions(0.3, n_variants=3)
    seen = [key for (call,) in whole_batches(first, batch_windows) for key in rows_of(call, first)]
    assert len(seen) == len(set(seen)) == first.size
    assert saved_share(list(whole_batches(first, batch_windows)), first, WINDOW) == 0


def test_what_is_saved_is_what_is_not_run():
    n_run = []
    for reuse in (True, False):
        job = small_job(probs=(0.02,), batch_windows=3, reuse=reuse)
        write, _ = collector()
        make_shards(job, range(3), write, lambda n: None)
        assert isinstance(job.reader, ExactReader)
        n_run.append(job.reader.n_tokens)
    assert n_run[0] < 0.7 * n_run[1]


def test_windows_with_nothing_replaced_are_not_run_again():
    first = first_positions(0.0, n_variants=3)
    batches = list(reusing_batches(first, WINDOW, 8))
    assert all(len(batch) == 1 for batch in batches)
    assert saved_share(batches, first, WINDOW) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("p", "pays"), [(0.3, False), (0.01, True), (0.0, True)])
def test_beginnings_are_reused_where_that_saves_enough_and_the_model_can(p, pays):
    job = small_job(probs=(p,), reuse=True)
    first = first_positions(p)
    saved = saved_share(list(reusing_batches(first, WINDOW, 4)), first, WINDOW)
    assert (saved >= WORTH) == pays
    assert (saved_share(choose_batches(first, WINDOW, 4, WORTH), first, WINDOW) == saved) == pays
    for worth in (saved + 1e-9, NEVER):
        assert saved_share(choose_batches(first, WINDOW, 4, worth), first, WINDOW) == 0
    shard = prepare_shard(job.plan, job.windows, job.tokenizer, 0)
    assert len(batches_of(dataclasses.replace(job, worth=0.0), shard)[0]) == 2 - (p == 0)
    cannot = small_job(probs=(p,), reuse=False)
    assert all(batch[0].variants == (0, 1) for batch in batches_of(dataclasses.replace(cannot, worth=0.0), shard))


def test_sorting_saves_more_than_the_order_of_the_text():
    first = first_positions(0.02, n_windows=64)
    saved = saved_share(list(reusing_batches(first, WINDOW, 8)), first, WINDOW)
    unsorted = [first[1, i : i + 8].min() for i in range(0, 64, 8)]
    assert saved > 1.5 * (np.mean(unsorted) / WINDOW / 2)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_cache_made_by_reuse_has_the_same_columns_and_activations_up_to_rounding(
    tmp_path, monkeypatch, capsys, family
):
    loaded = load_model(str(save_model(tmp_path / "model", family)))
    text = write_text(tmp_path / "text.txt", 400)
    request = request_for(loaded, text, mask_prob="0.02,0.05", layers="2,attn_out.1", context=48)
    run.harvest(loaded, request, tmp_path / "reused")
    assert "prefix reuse: saves " in capsys.readouterr().out
    monkeypatch.setattr(run, "Job", partial(Job, worth=NEVER))
    run.harvest(loaded, request, tmp_path / "plain")
    assert "prefix reuse" not in capsys.readouterr().out
    reused, plain = ActivationCache.open(tmp_path / "reused"), ActivationCache.open(tmp_path / "plain")
    assert reused.plan == plain.plan
    for shard in plain.shards:
        for name in ("token", "token_masked", "token_masked_1", "mask", "window", "pos", "doc", "flags"):
            assert np.array_equal(reused.column(name, shard), plain.column(name, shard))
        for hook in plain.plan.hooks:
            for variant in plain.plan.variants:
                a, b = (cache.activations(hook.name, variant.name, shard) for cache in (reused, plain))
                np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=2e-3, atol=2e-3)


def test_a_model_that_cannot_go_on_is_run_whole(tmp_path, capsys):
    loaded = load_model(str(save_model(tmp_path / "model", "gemma2")))  # its local window is shorter than the text
    request = request_for(loaded, write_text(tmp_path / "text.txt", 400), mask_prob="0.01")
    with open_reader(loaded, request.hook_points) as reader:
        assert not reader.can_continue(request.window_tokens)
    run.harvest(loaded, request, tmp_path / "cache")
    assert "prefix reuse" not in capsys.readouterr().out


def test_reuse_needs_no_more_windows_than_a_batch():
    job = small_job(probs=(0.02, 0.05), batch_windows=2, reuse=True)
    write, _ = collector()
    make_shards(job, range(3), write, lambda n: None)
    assert isinstance(job.reader, ExactReader)
    assert max(n for n, _ in job.reader.shapes) <= 2
