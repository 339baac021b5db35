"""Hook points: every spelling of one place is the same place, and anything else is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_spec import HookPoint, UserError
from cache_spec.hook_point import SITES

POINTS = st.builds(HookPoint, st.sampled_from(SITES), st.integers(0, 200))


@given(point=POINTS)
def test_a_hook_point_reads_its_own_names(point):
    for text in (str(point), point.group, point.tl_name, f"  {point}\n"):
        assert HookPoint.parse(text) == point


@given(layer=st.integers(0, 200))
def test_every_spelling_of_a_layer_is_the_residual_stream_after_it(layer):
    spellings = ("{}", "layer_{}", "layers.{}", "h.{}", "model.layers.{}", "transformer.h.{}", "gpt_neox.layers.{}")
    for spelling in (*spellings, "resid_post.{}", "blocks.{}.hook_resid_post"):
        assert HookPoint.parse(spelling.format(layer)) == HookPoint("resid_post", layer)


@given(one=POINTS, other=POINTS)
def test_different_places_have_different_names(one, other):
    for name in ("group", "tl_name"):
        assert (getattr(one, name) == getattr(other, name)) == (one == other)


@given(point=POINTS)
def test_a_group_is_a_plain_folder_name(point):
    assert point.group.replace("_", "").isalnum()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "resid_post",
        "resid_post.",
        "resid_post.-1",
        "resid_mid.3",
        "layer",
        "layers.3.mlp",
        "3.5",
        "blocks.3",
        "1 2",
    ],
)
def test_anything_else_is_refused_with_the_sites_that_exist(text):
    with pytest.raises(UserError, match="resid_post, resid_pre, mlp_out, attn_out"):
        HookPoint.parse(text)


def test_hook_points_sort_by_site_and_layer():
    points = [HookPoint("resid_post", 10), HookPoint("resid_post", 9), HookPoint("mlp_out", 30)]
    assert sorted(points) == [points[2], points[1], points[0]]
