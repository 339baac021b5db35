"""Planning: rows and shards that suit a reader, a scale that suits fp16, and a plan that the same command repeats."""

import dataclasses

import numpy as np
import pytest
import torch
from harvest_fixtures import options, random_documents, request_for, save_model, write_text
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cache_spec import FP16_MAX, HookPoint, UserError
from cache_spec.plan import check_plan
from harvest import planning
from harvest.model import load_model
from harvest.planning import choose_layout, differences, make_plan, outline, scale_for
from harvest.request import make_request


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(save_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


@settings(deadline=None)
@given(
    n_tokens=st.integers(2048, 10**10), held_out=st.floats(0, 0.5), row_bytes=st.sampled_from([64, 384, 9216, 10**6])
)
@example(n_tokens=400_000, held_out=0.05, row_bytes=384)
@example(n_tokens=2048, held_out=0.5, row_bytes=64)
def test_shards_are_whole_few_enough_to_mix_and_small_enough_to_hold(n_tokens, held_out, row_bytes):
    layout = choose_layout(n_tokens, held_out, row_bytes)
    rows, n_train, n_held_out = layout.shard_rows, layout.n_train_rows, layout.n_held_out_rows
    assert rows & (rows - 1) == 0
    assert rows >= 1024
    assert n_train > 0
    assert n_train % rows == 0
    assert n_held_out % 1024 == 0
    assert (n_held_out > 0) == (held_out > 0)
    assert n_train + n_held_out <= n_tokens
    assert n_tokens - n_train - n_held_out < rows + 1024  # what rounding loses
    assert rows * row_bytes <= max(2**30, 1024 * row_bytes)
    wanted = n_tokens - n_held_out
    assert n_train // rows >= min(4, wanted // 1024)
    if wanted >= 4 * 2**14 and 2**14 * row_bytes <= 2**30:
        assert rows >= 2**14


def test_the_layouts_of_the_documentation():
    layout = choose_layout(400_000, 0.05, 2 * 96 * 2)
    assert (layout.n_train_rows, layout.n_held_out_rows, layout.shard_rows) == (376_832, 19_456, 16_384)
    assert choose_layout(500_000_000, 0.05, 2 * 2304 * 2).shard_rows == 2**16
    assert choose_layout(500_000_000, 0.05, 2 * 768 * 2).shard_rows == 2**18
    assert choose_layout(2_048, 0.05, 384).shard_rows == 1024


@pytest.mark.parametrize(("n_tokens", "held_out"), [(1, 0.05), (2047, 0.05), (1023, 0.0)])
def test_too_few_tokens_are_refused(n_tokens, held_out):
    with pytest.raises(UserError, match="too few; the least is 1,024 to train on"):
        choose_layout(n_tokens, held_out, 100)


@settings(deadline=None)
@given(st.floats(0, 1e9))
@example(FP16_MAX / 4)
@example(FP16_MAX)
@example(696_320.0)  # the largest published, of a 27B model
def test_the_scale_is_the_smallest_power_of_two_that_leaves_headroom(absmax):
    scale = scale_for(absmax)
    assert np.frexp(scale)[0] == 0.5
    assert absmax * 4 / scale <= FP16_MAX
    assert scale == 1 or absmax * 4 / (scale / 2) > FP16_MAX


def test_the_same_request_leads_to_the_same_plan_and_windows(loaded, text):
    (plan, windows), (again, same) = (make_plan(loaded, request_for(loaded, text)) for _ in range(2))
    assert (plan, plan.cache_id) == (again, again.cache_id)
    assert np.array_equal(windows.tokens, same.tokens)
    check_plan(plan)


def test_a_plan_without_reading_the_text_has_the_same_rows_and_shards(loaded, text):
    request = request_for(loaded, text)
    plan, sketch = make_plan(loaded, request)[0], outline(loaded, request)
    assert dataclasses.replace(sketch, source=plan.source) == plan
    assert sketch.source.items() <= plan.source.items()


def test_no_document_is_in_both_splits_and_held_out_rows_start_a_shard(loaded, text):
    plan, windows = make_plan(loaded, request_for(loaded, text))
    assert plan.n_train_rows % plan.shard_rows == 0
    assert plan.n_rows > plan.n_train_rows
    train, held_out = np.split(windows.docs, [plan.n_train_windows])
    assert not np.intersect1d(train, held_out).size
    assert len(windows.tokens) == plan.n_train_windows + plan.n_held_out_windows


CHANGES = [
    ({"tokens": "5120"}, "--tokens 6144, not 5120"),
    ({"layers": "0,mlp_out.1"}, "--layers resid_post.1, not resid_post.0,mlp_out.1"),
    ({"mask_prob": 0.5}, "--mask-prob 0.3, not 0.5"),
    ({"mask_prob": 0.0}, "--mask-prob 0.3, not 0.0"),
    ({"mask_string": "w3"}, "--mask-string '...', not 'w3'"),
    ({"random_prob": 0.1}, "--random-prob 0.0, not 0.1"),
    ({"context": 16}, "--context 32, not 16"),
    ({"held_out": 0.25}, "--held-out 0.2, not 0.25"),
    ({"seed": 1}, "--seed 0, not 1"),
    ({"scale_factor": 4.0}, "--scale-factor 1.0, not 4.0"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_plan_differs_from_another_request_by_the_option_that_changed(loaded, text, change, said):
    plan, _ = make_plan(loaded, request_for(loaded, text))
    assert differences(plan, loaded, request_for(loaded, text)) == []
    assert said in differences(plan, loaded, request_for(loaded, text, **change))


def test_a_plan_differs_for_another_text_or_model(loaded, text, tmp_path):
    plan, _ = make_plan(loaded, request_for(loaded, text))
    other = write_text(tmp_path / "other.txt", 400)
    assert "--dataset 'text.txt', not 'other.txt'" in differences(plan, loaded, request_for(loaded, other))
    gpt2 = load_model(str(save_model(tmp_path / "gpt2", "gpt2")))
    assert differences(plan, gpt2, request_for(gpt2, text))[0].startswith("--model")


def test_the_seed_changes_what_is_drawn_and_not_how_many(loaded, text):
    (plan, windows), (other, others) = (make_plan(loaded, request_for(loaded, text, seed=seed)) for seed in (0, 1))
    assert plan.n_rows == other.n_rows
    assert plan.cache_id != other.cache_id
    assert not np.array_equal(windows.tokens, others.tokens)


def test_a_pilot_scales_only_the_hook_points_that_need_it(tmp_path, text):
    loaded = load_model(str(save_model(tmp_path)))
    loaded.model.get_parameter("gpt_neox.layers.1.mlp.dense_4h_to_h.weight").mul_(1e5)
    plan, _ = make_plan(loaded, request_for(loaded, text, layers="0,1"))
    assert plan.hooks[0].scale_factor == 1.0
    assert plan.hooks[1].scale_factor >= 4.0
    given_scale, _ = make_plan(loaded, request_for(loaded, text, layers="0,1", scale_factor=64.0))
    assert [hook.scale_factor for hook in given_scale.hooks] == [64.0, 64.0]


def test_the_pilot_sees_masked_tokens_too(loaded, text, monkeypatch):
    seen = []
    real = planning.activations
    monkeypatch.setattr(
        planning, "activations", lambda model, batch, points: seen.append(batch) or real(model, batch, points)
    )
    make_plan(loaded, request_for(loaded, text, mask_prob=1.0))
    token = loaded.tokenizer.convert_tokens_to_ids("...")
    assert 0.4 < (torch.cat(seen) == token).float().mean() < 0.6  # half of the rows are the masked variant


def test_a_model_without_finite_activations_is_refused(tmp_path, text):
    loaded = load_model(str(save_model(tmp_path)))
    loaded.model.get_parameter("gpt_neox.embed_in.weight")[5] = float("inf")
    with pytest.raises(UserError, match=r"infinite or NaN activations at resid_post.1"):
        make_plan(loaded, request_for(loaded, text))


def test_text_that_is_too_short_says_how_much_there_is_and_what_would_fit(loaded, tmp_path):
    text = write_text(tmp_path / "text.txt", 200)
    with pytest.raises(UserError, match=r"200 documents give about [\d,]+ tokens, and 50,000 were asked") as caught:
        make_plan(loaded, request_for(loaded, text, tokens="50k"))
    advice = str(caught.value).split("--tokens ")[1].split()[0]
    plan, _ = make_plan(loaded, request_for(loaded, text, tokens=advice))
    assert plan.n_rows > 0.7 * int(advice.replace("_", ""))


def test_a_text_of_a_few_words_is_refused(loaded, tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2 w3")
    with pytest.raises(UserError, match="too short: 1 documents give about 0 tokens, and the least is a few thousand"):
        make_plan(loaded, request_for(loaded, tmp_path / "text.txt"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path, text):
    loaded = load_model(str(save_model(tmp_path)))
    loaded.tokenizer.add_tokens(["w99"])
    (tmp_path / "text.txt").write_text("\n\n".join([*random_documents(400), "w99 w99"] * 2))
    with pytest.raises(UserError, match="mixes files of two models"):
        make_plan(loaded, request_for(loaded, tmp_path / "text.txt", tokens="20k"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": "3"}, "3 layers, numbered 0 to 2; there is no layer 3"),
        ({"layers": ""}, "--layers is missing, .* 3 layers, numbered 0 to 2"),
        ({"layers": "middle"}, "'middle' is not a hook point"),
        ({"mask_prob": 1.5}, "--mask-prob is 1.5, and a probability must be from 0 to 1"),
        ({"mask_prob": -0.1}, "--mask-prob is -0.1"),
        ({"mask_prob": float("nan")}, "--mask-prob is nan"),
        ({"random_prob": 2.0}, "--random-prob is 2.0"),
        ({"mask_string": "w1 w2"}, "must be one token"),
        ({"context": 65}, "--context is 65, and .* takes windows of 2 to 64 tokens"),
        ({"context": 1}, "--context is 1"),
        ({"held_out": 0.6}, "--held-out is 0.6"),
        ({"scale_factor": 3.0}, "--scale-factor is 3"),
        ({"scale_factor": -2.0}, "--scale-factor is -2"),
        ({"tokens": "lots"}, "--tokens is 'lots'"),
    ],
)
def test_an_option_out_of_range_is_named(loaded, change, said):
    with pytest.raises(UserError, match=said):
        make_request(loaded, loaded.name, **options(**change))


def test_options_left_out_are_those_of_the_short_name():
    tiny = load_model("tiny", weights=False)
    request = make_request(tiny, "tiny", **options(layers="", context=0))
    assert (request.dataset, request.window_tokens) == ("embedded", 64)
    assert len(request.hook_points) == 1


def test_a_layer_given_twice_is_harvested_once(loaded):
    request = make_request(loaded, loaded.name, **options(layers="1,resid_post.1,layers.1,0"))
    assert request.hook_points == (HookPoint("resid_post", 1), HookPoint("resid_post", 0))


def test_without_masking_there_is_only_the_clean_variant(loaded):
    request = make_request(loaded, loaded.name, **options(mask_prob=0.0, mask_string="no single token"))
    assert [variant.name for variant in request.variants] == ["clean"]
