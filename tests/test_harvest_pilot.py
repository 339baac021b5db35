"""The pilot: a scale that suits fp16 at every hook point, over every variant, and a speed that was measured."""

import time

import numpy as np
import pytest
import torch
from harvest_fixtures import request_for, save_model, write_text
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cache_spec import FP16_MAX, HookPoint, UserError
from harvest import pilot
from harvest.model import load_model
from harvest.pilot import check_scales, largest_activations, model_speed, scale_for
from harvest.planning import make_plan, outline
from harvest.reader import Reader, open_reader


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(save_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


def plan_of(loaded, text, **changes):
    request = request_for(loaded, text, **changes)
    with open_reader(loaded, request.hook_points) as reader:
        return make_plan(loaded, reader, request)


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


def test_the_largest_activations_are_those_of_the_model(loaded, text):
    plan, windows = plan_of(loaded, text, layers="0,mlp_out.1", mask_prob=0)
    points = tuple(HookPoint.parse(hook.hook_point) for hook in plan.hooks)
    n_seen = pilot._PILOT_TOKENS // plan.window_tokens
    tokens = torch.from_numpy(windows.tokens[:n_seen].astype(np.int64))
    with open_reader(loaded, points) as reader:
        found = largest_activations(reader, loaded.tokenizer, plan, windows)
        whole = reader.read(tokens)
    assert found == pytest.approx({point: float(whole[point].abs().max()) for point in points}, rel=1e-5)


def test_a_pilot_scales_only_the_hook_points_that_need_it(tmp_path, text):
    loaded = load_model(str(save_model(tmp_path)))
    loaded.model.get_parameter("gpt_neox.layers.1.mlp.dense_4h_to_h.weight").mul_(1e5)
    plan, _ = plan_of(loaded, text, layers="0,1")
    assert plan.hooks[0].scale_factor == 1.0
    assert plan.hooks[1].scale_factor >= 4.0
    given_scale, _ = plan_of(loaded, text, layers="1", scale_factor=1024.0)
    assert [hook.scale_factor for hook in given_scale.hooks] == [1024.0]


def test_a_scale_factor_that_is_too_small_is_refused_with_one_that_is_not(tmp_path, text):
    loaded = load_model(str(save_model(tmp_path)))
    loaded.model.get_parameter("gpt_neox.layers.1.mlp.dense_4h_to_h.weight").mul_(1e6)
    with pytest.raises(UserError, match=r"activations reach [\d,]+ at resid_post\.1, .* --scale-factor 1 is") as caught:
        plan_of(loaded, text, layers="0,1", scale_factor=1.0)
    advised = str(caught.value).split("give ")[1].split(",")[0]
    scales = [hook.scale_factor for hook in plan_of(loaded, text, layers="0,1", scale_factor=advised)[0].hooks]
    assert scales == [1.0, float(advised.partition("=")[2])]


def test_a_scale_that_just_fits_is_enough():
    point = HookPoint("resid_post", 0)
    check_scales({point: 2.0}, {point: 2 * FP16_MAX})
    with pytest.raises(UserError, match=r"give resid_post\.0=16, or 0"):
        check_scales({point: 2.0}, {point: 2 * FP16_MAX + 1})


def test_a_scale_that_leaves_nothing_of_the_activations_is_refused():
    point = HookPoint("resid_post", 0)
    check_scales({point: 16.0}, {point: 16.0})
    with pytest.raises(UserError, match=r"--scale-factor 32 would store 0\.5 of that, .*; give resid_post\.0=1, or 0"):
        check_scales({point: 32.0}, {point: 16.0})
    check_scales({point: 1.0}, {point: 0.01})  # nothing is divided


def test_each_hook_point_may_have_a_scale_of_its_own(loaded, text):
    plan, _ = plan_of(loaded, text, layers="0,1", scale_factor="resid_post.1=4")
    assert [hook.scale_factor for hook in plan.hooks] == [1.0, 4.0]
    plan, _ = plan_of(loaded, text, layers="0,1", scale_factor="2,layers.1=4")
    assert [hook.scale_factor for hook in plan.hooks] == [2.0, 4.0]


def test_the_pilot_sees_every_variant(loaded, text, monkeypatch):
    seen, real = [], Reader.read
    monkeypatch.setattr(Reader, "read", lambda reader, tokens: seen.append(tokens) or real(reader, tokens))
    plan_of(loaded, text, mask_prob="1.0,0.5")
    token = loaded.tokenizer.convert_tokens_to_ids("...")
    share = (torch.cat(seen) == token).float().mean()
    assert 0.45 < share < 0.55  # all of one third of the rows, half of another, none of the clean ones


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_model_without_finite_activations_is_refused(tmp_path, text, value):
    loaded = load_model(str(save_model(tmp_path)))
    loaded.model.get_parameter("gpt_neox.embed_in.weight")[5] = float(value)
    with pytest.raises(UserError, match=r"infinite or NaN activations at resid_post.1; the widest --dtype"):
        plan_of(loaded, text)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [("float16", "try --dtype bfloat16 or --dtype float32"), ("bfloat16", "try --dtype float32"), ("float32", "leave")],
)
def test_the_remedy_is_a_flag_that_may_help(dtype, said):
    assert said in pilot.remedy(dtype)


@pytest.mark.parametrize("mask_prob", ["0", "0.3"])
def test_the_speed_counts_the_tokens_of_every_variant(loaded, text, monkeypatch, mask_prob):
    plan = outline(loaded, request_for(loaded, text, mask_prob=mask_prob))
    shapes, real = [], Reader.read

    def slow(reader, tokens):
        shapes.append(tuple(tokens.shape))
        time.sleep(0.5 if len(shapes) == 1 else 0.05)  # the first is the warm-up and does not count
        return real(reader, tokens)

    monkeypatch.setattr(Reader, "read", slow)
    with open_reader(loaded, (HookPoint("resid_post", 1),)) as reader:
        speed = model_speed(reader, plan, 3)
    assert set(shapes) == {(3 * len(plan.variants), 32)}
    assert len(shapes) >= 3
    n_tokens = 3 * 32 * len(plan.variants)
    assert n_tokens / 0.15 < speed <= n_tokens / 0.05


def test_a_slow_model_is_measured_once_and_not_for_minutes(loaded, text, monkeypatch):
    plan, seen = outline(loaded, request_for(loaded, text)), []
    monkeypatch.setattr(pilot, "_timed", lambda reader, tokens: seen.append(tokens) or 100.0)
    with open_reader(loaded, (HookPoint("resid_post", 1),)) as reader:
        assert model_speed(reader, plan, 1) == 2 * 32 / 100
    assert len(seen) == 2


def test_a_batch_that_does_not_fit_the_device_is_one_sentence(loaded, text, monkeypatch):
    def full(reader, tokens):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Reader, "read", full)
    plan = outline(loaded, request_for(loaded, text))
    with (
        open_reader(loaded, (HookPoint("resid_post", 1),)) as reader,
        pytest.raises(UserError, match=r"8 x 32 tokens does not fit on cpu; give a smaller --batch-windows"),
    ):
        model_speed(reader, plan, 4)
