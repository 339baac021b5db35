"""The bench: which rows of a cache are scored, and what the labelled text holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_fixtures import make_hook, make_plan, make_shard

from cache_spec import (
    FLAG_BOS,
    FLAG_PAD,
    FLAG_SPECIAL,
    FLAG_VALID,
    ActivationCache,
    CacheDamaged,
    CacheError,
    HookPoint,
    UserError,
    create_cache,
    finalize_cache,
    write_shard,
)
from cache_spec.seeds import derive_seed
from evaluate import bench, generated_text, windows
from evaluate.held_out import read_held_out
from evaluate.language import EVERYWHERE
from evaluate.rows import class_labels
from evaluate.store import Store
from evaluate.text_sources import TextSources
from harvest import embedded
from harvest.model import LoadedModel, activations, load_model

FLAGS = [FLAG_VALID, FLAG_VALID | FLAG_BOS, FLAG_VALID | FLAG_SPECIAL, FLAG_VALID | FLAG_PAD, 0]


@pytest.fixture
def cache(tmp_path):
    """Two training and two held-out shards, every kind of flag, stored values half of the true ones."""
    plan = replace(make_plan(n_rows=256, n_train_rows=128, n_masked=2), hooks=(make_hook(1, 6, scale_factor=2.0),))
    create_cache(tmp_path / "cache", plan)
    for shard in range(plan.n_shards):
        values, columns = make_shard(plan, shard)
        columns["flags"] = np.array([FLAGS[i % 5] for i in range(64)], dtype=np.uint8)
        columns["doc"] = np.arange(64, dtype=np.uint32) // 5
        columns["mask"] = (np.arange(64) % 4).astype(np.uint8)
        write_shard(tmp_path / "cache", plan, shard, values, columns)
    finalize_cache(tmp_path / "cache")
    return ActivationCache.open(tmp_path / "cache")


def test_only_plain_held_out_tokens_are_read_and_documents_are_not_shared(cache):
    found = read_held_out(cache, cache.plan.hooks[0], "cpu")
    plain = np.arange(64) % 5 == 0
    odd = np.arange(64) // 5 % 2 == 1
    for rows, chosen in ((found.calibration, plain & odd), (found.clean, plain & ~odd)):
        stored = np.concatenate([cache.activations("layer_1", "clean", shard)[chosen] for shard in (2, 3)])
        np.testing.assert_array_equal(rows.x.numpy(), stored.astype(np.float32) * 2)
    masked = np.concatenate([cache.activations("layer_1", "masked", shard)[plain & ~odd] for shard in (2, 3)])
    assert found.masked is not None
    np.testing.assert_array_equal(found.masked.x.numpy(), masked.astype(np.float32) * 2)
    bit = np.concatenate([np.arange(64)[plain & ~odd] % 2 == 1] * 2)
    np.testing.assert_array_equal(found.replaced, bit)


def test_no_document_is_both_calibrated_on_and_scored(tmp_path):
    """Documents of several tokens each, and rows that hold the number of their document."""
    plan = replace(make_plan(n_rows=192, n_train_rows=64, n_masked=0), hooks=(make_hook(1, 6),))
    create_cache(tmp_path / "cache", plan)
    for shard in range(plan.n_shards):
        values, columns = make_shard(plan, shard)
        columns["flags"] = np.full(64, FLAG_VALID, dtype=np.uint8)
        columns["doc"] = (64 * shard + np.arange(64, dtype=np.uint32)) // 5
        values["layer_1", "clean"][:] = columns["doc"][:, None]
        write_shard(tmp_path / "cache", plan, shard, values, columns)
    finalize_cache(tmp_path / "cache")
    found = read_held_out(ActivationCache.open(tmp_path / "cache"), plan.hooks[0], "cpu")
    calibrated, scored = (set(rows.x[:, 0].tolist()) for rows in (found.calibration, found.clean))
    assert calibrated
    assert scored
    assert not calibrated & scored


def test_a_cache_without_held_out_rows_is_an_error_that_says_what_to_do(tmp_path):
    plan = make_plan(n_rows=128, n_train_rows=128)
    create_cache(tmp_path / "cache", plan)
    for shard in range(plan.n_shards):
        write_shard(tmp_path / "cache", plan, shard, *make_shard(plan, shard))
    finalize_cache(tmp_path / "cache")
    with pytest.raises(CacheError, match="--held-out"):
        read_held_out(ActivationCache.open(tmp_path / "cache"), plan.hooks[0], "cpu")


def test_a_cache_without_masked_rows_is_scored_on_clean_ones_alone(tmp_path):
    plan = make_plan(n_rows=192, n_train_rows=64, n_masked=0)
    create_cache(tmp_path / "cache", plan)
    for shard in range(plan.n_shards):
        values, columns = make_shard(plan, shard)
        columns["flags"] = np.full(64, FLAG_VALID, dtype=np.uint8)
        write_shard(tmp_path / "cache", plan, shard, values, columns)
    finalize_cache(tmp_path / "cache")
    found = read_held_out(ActivationCache.open(tmp_path / "cache"), plan.hooks[0], "cpu")
    assert found.masked is None
    assert found.replaced is None


MODEL, TRUTH = {"splice", "splice_shifted", "shifted"}, {"language", "masked_language", "tasks"}


def made_bench(cache: ActivationCache, wanted: set[str], *, seed: int = 0, store: Path | None = None, **texts: Any):
    return bench.make_bench(
        cache,
        cache.plan.hooks[0],
        device="cpu",
        seed=seed,
        wanted=wanted,
        store=Store(store),
        sources=TextSources(**texts),
    )


def unreachable(name: str, **how: Any) -> LoadedModel:
    if name != "tiny":
        raise UserError(f"'{name}' cannot be had")
    return load_model(name, **how)


def test_what_cannot_be_measured_is_said_with_its_reason(cache, monkeypatch):
    monkeypatch.setattr(bench, "load_model", unreachable)
    made = made_bench(cache, MODEL | TRUTH)
    assert made.language is made.splice is made.masked_language is made.spelling is None
    assert made.tasks == ()
    (sentence,) = made.missing
    assert "'made-up' cannot be had" in sentence
    assert all(bench.WHAT[name] in sentence for name in MODEL | TRUTH)
    assert made_bench(cache, set()).missing == ()


def test_another_revision_of_the_model_is_not_used(cache, monkeypatch):
    loaded = replace(load_model("tiny"), revision="another")
    monkeypatch.setattr(bench, "load_model", lambda name, **_: loaded)
    cache.plan.model["revision"] = "not tiny's"
    made = made_bench(cache, MODEL)
    assert made.splice is None
    assert "at revision another here" in made.missing[0]


@pytest.fixture(scope="module")
def small_language():
    """The labelled text of the embedded model, in small."""
    patch = pytest.MonkeyPatch()
    patch.setattr(generated_text, "N_DOCUMENTS", {"fit": 60, "test": 60, "shifted": 40})
    patch.setattr(generated_text, "N_EVERYWHERE", 500)
    patch.setattr(generated_text, "PROBE_ROWS", 150)
    patch.setattr(windows, "N_SPLICE_WINDOWS", 5)
    loaded = load_model("tiny")
    source = windows.Source(loaded=loaded, hook_point=HookPoint.parse(embedded.HOOK_POINT), store=Store(None))
    language = generated_text.make_language(source, seed=3)
    yield source, language, windows.generated_windows(3, "test")
    patch.undo()


def test_labelled_rows_are_the_models_activations_at_their_tokens(small_language):
    source, language, made = small_language
    whole = activations(source.loaded, torch.from_numpy(made.tokens), [source.hook_point])[source.hook_point]
    flat = whole.reshape(-1, source.loaded.d_model)
    numbers = [
        int((flat - row).abs().sum(1).argmin()) for row in language.test.x[:20]
    ]  # the first rows kept lie in the first windows
    for i, number in enumerate(numbers):
        torch.testing.assert_close(flat[number], language.test.x[i], rtol=1e-4, atol=1e-4)
        assert (made.features.reshape(-1, made.features.shape[-1])[number] == language.test.features[i]).all()


def test_every_relation_and_task_finds_its_rows_and_the_first_token_is_never_one(small_language):
    _, language, made = small_language
    bos = list(language.feature_names).index("token <bos>")
    assert made.features[:, 0, bos].all()
    for rows in (language.fit, language.test, language.shifted):
        assert not rows.features[:, bos].any()
        for task in language.tasks:
            assert len(class_labels(rows, task.attribute, task.positions)[0]) > 0
        for relation in language.relations:
            assert len(class_labels(rows, relation.parent, relation.positions)[0]) > 0
    assert language.test.positions[EVERYWHERE].sum() == language.even.n == 500
    sample = generated_text.shifted_sample(language)
    assert sample.features is not None
    assert sample.n == 500 == len(sample.features)


def test_position_sets_are_thinned_to_what_is_read(small_language):
    _, language, _ = small_language
    related = {relation.positions for relation in language.relations}
    for task in language.tasks:
        if task.positions not in related:
            assert language.fit.positions[task.positions].sum() <= 150


def test_the_three_texts_and_other_seeds_share_no_documents(small_language):
    _, language, made = small_language
    other = embedded.generate(60, derive_seed("evaluate/text", 3, "fit"))
    assert not (made.tokens[:, None] == other.tokens[None]).all(-1).any()
    assert not torch.equal(language.fit.x[:50], language.test.x[:50])


def test_a_splice_replaces_every_token_but_the_special_ones(small_language):
    source, _, made = small_language
    splice = windows.make_splice(source, made, "splice")
    assert (splice.replaced == (splice.tokens != source.loaded.tokenizer.bos_token_id)).all()
    assert splice.rows.features is not None
    assert splice.rows.n == int(splice.replaced.sum()) == len(splice.rows.features)


def test_texts_are_packed_one_after_another_and_an_end_that_fills_no_window_is_left_out(small_language):
    source, _, _ = small_language
    loaded = source.loaded
    stream = embedded.documents(seed=5)
    texts = [next(stream) for _ in range(3)]
    packed = windows.packed_windows(loaded, texts, 50).tokens
    ids = [token for text in texts for token in loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert packed.shape == (len(ids) // 49, 50)
    assert (packed[:, 0] == loaded.tokenizer.bos_token_id).all()
    assert packed[:, 1:].reshape(-1).tolist() == ids[: packed[:, 1:].size]
    assert windows.packed_windows(loaded, ["one"], 50).tokens.shape == (0, 50)


def cache_of_the_embedded_model(path: Path, model_id: str, d_model: int) -> ActivationCache:
    plan = make_plan(n_rows=192, n_train_rows=64, d_model=d_model)
    plan = replace(plan, model={**plan.model, "id": model_id, "revision": load_model("tiny", weights=False).revision})
    create_cache(path, plan)
    for shard in range(plan.n_shards):
        values, columns = make_shard(plan, shard)
        columns["flags"] = np.full(64, FLAG_VALID, dtype=np.uint8)
        write_shard(path, plan, shard, values, columns)
    finalize_cache(path)
    return ActivationCache.open(path)


def test_the_embedded_models_folder_has_ground_truth_and_windows_are_the_same_whatever_is_asked(
    small_language, tmp_path
):
    source, _, expected = small_language
    opened = cache_of_the_embedded_model(tmp_path / "cache", str(embedded.FOLDER), source.loaded.d_model)
    alone, both = (made_bench(opened, wanted, seed=3) for wanted in (MODEL, MODEL | TRUTH))
    assert alone.missing == both.missing == ()
    assert both.language is not None
    assert both.masked_language is not None
    assert len(both.tasks) > 0
    for made in (alone, both):
        assert made.splice is not None
        assert made.splice_shifted is not None
        assert made.shifted is not None
        assert torch.equal(made.splice.tokens, torch.from_numpy(expected.tokens))
        assert not torch.equal(made.splice.tokens, made.splice_shifted.tokens)
        assert made.model.n_parameters == sum(p.numel() for p in source.loaded.model.parameters())


def test_the_model_runs_once_over_the_text_and_a_second_bench_reads_what_the_first_kept(
    small_language, tmp_path, monkeypatch
):
    source, _, _ = small_language
    opened = cache_of_the_embedded_model(tmp_path / "cache", "tiny", source.loaded.d_model)
    first = made_bench(opened, MODEL | {"language", "tasks"}, seed=3, store=tmp_path / "kept")
    monkeypatch.setattr(windows, "model_rows", None)  # whoever runs the model again, fails
    again = made_bench(opened, MODEL | {"language", "tasks"}, seed=3, store=tmp_path / "kept")
    assert first.language is not None
    assert again.language is not None
    for name in ("fit", "test", "shifted", "even"):
        assert torch.equal(getattr(first.language, name).x, getattr(again.language, name).x)
    with pytest.raises(TypeError):
        made_bench(opened, {"language"}, seed=4, store=tmp_path / "kept")


def test_activations_kept_by_another_harvest_are_made_again(small_language, tmp_path, monkeypatch):
    source, _, _ = small_language
    opened = cache_of_the_embedded_model(tmp_path / "cache", "tiny", source.loaded.d_model)
    texts = tmp_path / "texts.jsonl"
    stream = embedded.documents(seed=5)
    rows = [{"text": next(stream), "label": i % 2, "split": "train" if i < 60 else "test"} for i in range(80)]
    texts.write_text("\n".join(map(json.dumps, rows)))
    made_bench(opened, {"splice"}, seed=3, store=tmp_path / "kept")
    made_bench(opened, {"tasks"}, seed=3, store=tmp_path / "kept", probe_data=(texts,))
    before = {file.name for file in (tmp_path / "kept").iterdir()}
    for module in ("windows", "text_rows"):
        monkeypatch.setattr(f"evaluate.{module}.code_hash", lambda packages: str(packages))
    made_bench(opened, {"splice"}, seed=3, store=tmp_path / "kept")
    made_bench(opened, {"tasks"}, seed=3, store=tmp_path / "kept", probe_data=(texts,))
    assert len({file.name for file in (tmp_path / "kept").iterdir()} - before) == len(before)


def test_text_of_ones_own_is_the_shifted_text_and_a_label_file_is_a_task(small_language, tmp_path):
    source, _, _ = small_language
    opened = cache_of_the_embedded_model(tmp_path / "cache", "tiny", source.loaded.d_model)
    stream = embedded.documents(seed=5)
    texts = [next(stream) for _ in range(120)]
    (tmp_path / "shifted.txt").write_text("\n\n".join(texts))
    lines = [
        json.dumps({"text": text, "label": i % 2, "split": ("train", "train", "test", "ood")[i // 2 % 4]})
        for i, text in enumerate(texts)
    ]
    (tmp_path / "parity.jsonl").write_text("\n".join(lines))
    plain = made_bench(opened, {"shifted", "tasks"}, seed=3)
    own = made_bench(
        opened,
        {"shifted", "tasks"},
        seed=3,
        shifted_text=tmp_path / "shifted.txt",
        probe_data=(tmp_path / "parity.jsonl",),
    )
    assert plain.shifted is not None
    assert own.shifted is not None
    assert own.shifted.features is None
    assert own.shifted.n != plain.shifted.n
    assert {task.name for task in own.tasks} - {task.name for task in plain.tasks} == {"parity"}
    assert own.facts != plain.facts


def test_without_the_windows_of_the_cache_the_rest_is_measured(cache, monkeypatch):
    loaded = replace(load_model("tiny"), revision="0")
    monkeypatch.setattr(bench, "load_model", lambda name, **how: load_model(name, **how) if name == "tiny" else loaded)
    made = made_bench(cache, {"splice"})
    assert made.splice is None
    (sentence,) = made.missing
    assert "windows.npy" in sentence
    assert made.clean.n > 0


def test_numbers_that_are_not_finite_are_damage_and_not_a_traceback(cache, monkeypatch):
    monkeypatch.setattr(ActivationCache, "activations", lambda *_: np.full((64, 6), np.nan, dtype="<f2"))
    with pytest.raises(CacheDamaged, match="python -m cache_spec verify"):
        read_held_out(cache, cache.plan.hooks[0], "cpu")
