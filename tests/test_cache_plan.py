"""A plan is strict: it survives JSON unchanged, and nothing else than a plan is taken for one."""

import dataclasses
import json

import pytest
from cache_fixtures import make_hook, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_spec import CacheDamaged, CacheTooNew, Plan, UserError, VariantPlan
from cache_spec.plan import MAX_COUNT, check_plan

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    model=st.dictionaries(st.text(), JSON_VALUES, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    n_rows=st.integers(1, 10**9),
)
def test_a_plan_survives_json(model, seed, n_rows):
    plan = dataclasses.replace(make_plan(n_rows=n_rows, seed=seed), model=model)
    check_plan(plan)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.cache_id == plan.cache_id


def test_the_cache_id_of_a_plan_never_changes():
    """Pinned: if this fails, old caches no longer match their plans, so raise the major version."""
    assert make_plan().cache_id == "ec23e47acc4d616e"
    assert dataclasses.replace(make_plan(), spec_version="1.0").cache_id == "e9f25035337a8bec"


@given(data=st.data())
def test_every_fact_counts_for_the_cache_id(data):
    plan = make_plan()
    changes = {"seed": 1, "n_rows": 151, "chunk_rows": 32, "row_order": "sequence", "model": {}, "source": {"id": "b"}}
    name = data.draw(st.sampled_from(sorted(changes)))
    assert dataclasses.replace(plan, **{name: changes[name]}).cache_id != plan.cache_id


@settings(deadline=None)
@given(data=st.data())
def test_a_plan_with_one_wrong_fact_is_refused(data):
    facts = make_plan(layers=(1, 3)).to_json()
    where = data.draw(st.sampled_from([(), ("hooks", 0), ("hooks", 1), ("variants", 1)]))
    target = facts
    for key in where:
        target = target[key]
    name = data.draw(st.sampled_from(sorted(target)))
    how = data.draw(st.sampled_from(["drop", "add", "retype"]))
    if how == "drop":
        del target[name]
    elif how == "add":
        target[name + "_"] = 1
    else:
        target[name] = data.draw(JSON_VALUES.filter(lambda value: type(value) is not type(target[name])))
    with pytest.raises(CacheDamaged):
        Plan.from_json(facts)


@given(value=JSON_VALUES)
def test_other_json_is_no_plan(value):
    with pytest.raises(CacheDamaged):
        Plan.from_json(value)


def test_a_plan_whose_facts_were_edited_is_refused():
    facts = make_plan().to_json() | {"seed": 5}
    with pytest.raises(CacheDamaged, match="cache_id"):
        Plan.from_json(facts)


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.3"])
def test_another_major_version_is_refused(version):
    facts = make_plan().to_json() | {"spec_version": version, "something_new": 1}
    with pytest.raises(CacheTooNew, match=version):
        Plan.from_json(facts)


def test_a_newer_minor_version_is_read():
    plan = dataclasses.replace(make_plan(), spec_version="1.7")
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("version", [None, 1, "", "1", "1.x", "one.two", "1.0.0"])
def test_a_version_that_is_none_is_damage(version):
    with pytest.raises(CacheDamaged, match="spec_version"):
        Plan.from_json(make_plan().to_json() | {"spec_version": version})


@given(n_rows=st.integers(1, 500), n_chunks=st.integers(1, 4), chunk_rows=st.integers(1, 20))
def test_shards_part_the_rows(n_rows, n_chunks, chunk_rows):
    plan = make_plan(n_rows=n_rows, chunk_rows=chunk_rows, shard_rows=n_chunks * chunk_rows)
    assert sum(plan.rows_in(shard) for shard in range(plan.n_shards)) == n_rows
    assert all(plan.rows_in(shard) == plan.shard_rows for shard in range(plan.n_shards - 1))
    n_train = sum(plan.rows_in(s) for s in range(plan.n_shards) if plan.split_of(s) == "train")
    assert n_train == plan.n_train_rows


def test_without_held_out_rows_the_short_last_shard_is_for_training():
    plan = make_plan(n_rows=100, n_train_rows=100)
    check_plan(plan)
    assert {plan.split_of(shard) for shard in range(plan.n_shards)} == {"train"}


MASKED = VariantPlan(name="masked", kind="mask", mask_prob=0.3)
CLEAN = VariantPlan(name="clean", kind="clean")
HOOK = make_hook(1, 6)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_rows": 0}, "at least one row"),
        ({"shard_rows": 0}, "positive"),
        ({"chunk_rows": 0}, "positive"),
        ({"chunk_rows": 15}, "multiple"),
        ({"n_train_rows": 100}, "splits a shard"),
        ({"n_train_rows": -64}, "n_train_rows"),
        ({"n_train_rows": 192}, "n_train_rows"),
        ({"window_tokens": 0}, "window_tokens"),
        ({"window_tokens": 2**16}, "window_tokens"),
        ({"n_held_out_windows": -1}, "negative"),
        ({"n_train_windows": MAX_COUNT}, "windows"),
        ({"row_order": "random"}, "row_order"),
        ({"hooks": ()}, "hooks"),
        ({"hooks": (HOOK, HOOK)}, "each once"),
        ({"hooks": (dataclasses.replace(HOOK, name="layer_2"),)}, "layer_1"),
        ({"hooks": (dataclasses.replace(HOOK, hook_point="nowhere"),)}, "nowhere"),
        ({"hooks": (dataclasses.replace(HOOK, d_model=0),)}, "d_model"),
        ({"hooks": (dataclasses.replace(HOOK, scale_factor=3.0),)}, "power of two"),
        ({"hooks": (dataclasses.replace(HOOK, scale_factor=0.0),)}, "power of two"),
        ({"hooks": (dataclasses.replace(HOOK, scale_factor=-2.0),)}, "power of two"),
        ({"hooks": (dataclasses.replace(HOOK, scale_factor=float("inf")),)}, "power of two"),
        ({"variants": ()}, "clean"),
        ({"variants": (MASKED, CLEAN)}, "clean"),
        ({"variants": (CLEAN, MASKED, MASKED)}, "differ"),
        ({"variants": (CLEAN, *(dataclasses.replace(MASKED, name=f"m{i}") for i in range(9)))}, "at most"),
        ({"variants": (CLEAN, dataclasses.replace(MASKED, name="../x"))}, "lower-case"),
        ({"variants": (CLEAN, dataclasses.replace(MASKED, kind="noise"))}, "kind"),
        ({"variants": (CLEAN, dataclasses.replace(MASKED, kind="clean"))}, "kind"),
        ({"variants": (CLEAN, dataclasses.replace(MASKED, mask_prob=1.5))}, "probability"),
        ({"seed": 1.0}, "plan.seed"),
        ({"seed": True}, "plan.seed"),
        ({"hooks": [HOOK]}, "plan.hooks"),
        ({"hooks": (dataclasses.replace(HOOK, scale_factor=1),)}, "scale_factor"),
        ({"model": {"n": {1, 2}}}, "JSON"),
        ({"model": {"n": float("nan")}}, "JSON"),
        ({"model": {1: "n"}}, "survive JSON"),
        ({"model": {"n": (1, 2)}}, "survive JSON"),
    ],
)
def test_a_plan_that_cannot_be_is_named_before_anything_is_written(change, word):
    with pytest.raises(UserError, match=word):
        check_plan(dataclasses.replace(make_plan(), **change))
