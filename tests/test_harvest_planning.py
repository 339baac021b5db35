"""Planning: rows and shards that suit a reader, a plan that the same command repeats, and what a resume refuses."""

import dataclasses
import shutil
from dataclasses import replace

import numpy as np
import pytest
from harvest_fixtures import random_documents, request_for, save_model, write_text
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cache_spec import CacheConflict, UserError
from cache_spec.plan import check_plan
from harvest import planning
from harvest import text as text_module
from harvest.model import load_model
from harvest.planning import choose_layout, differences, outline
from harvest.reader import open_reader


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(save_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


def make_plan(loaded, request):
    """The plan and windows, with the model opened for as long as planning takes."""
    with open_reader(loaded, request.hook_points) as reader:
        return planning.make_plan(loaded, reader, request)


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
    ({"mask_prob": "0.3,0.5"}, "--mask-prob 0.3, not 0.3,0.5"),
    ({"mask_prob": 0}, "--mask-prob 0.3, not 0"),
    ({"mask_string": "w3"}, "--mask-string '...', not 'w3'"),
    ({"mask_unit": "word"}, "--mask-unit 'token', not 'word'"),
    ({"random_prob": 0.1}, "--random-prob 0, not 0.1"),
    ({"context": 16}, "--context 32, not 16"),
    ({"held_out": 0.25}, "--held-out 0.2, not 0.25"),
    ({"seed": 1}, "--seed 0, not 1"),
    ({"scale_factor": 4.0}, "--scale-factor 1.0, not 4.0"),
]


@pytest.fixture(scope="module")
def planned(loaded, text):
    return make_plan(loaded, request_for(loaded, text))[0]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_plan_differs_from_another_request_by_the_option_that_changed(loaded, text, planned, change, said):
    assert differences(planned, loaded, request_for(loaded, text)) == []
    assert said in differences(planned, loaded, request_for(loaded, text, **change))


def test_several_variants_are_compared_one_by_one(loaded, text):
    asked = {"mask_prob": "0.3,0.5", "random_prob": "0.1,0.2"}
    plan, _ = make_plan(loaded, request_for(loaded, text, **asked))
    assert [variant.name for variant in plan.variants] == ["clean", "masked", "masked_1", "random", "random_1"]
    assert differences(plan, loaded, request_for(loaded, text, **asked)) == []
    for change, said in (
        ({"mask_prob": "0.5,0.3"}, ["--mask-prob 0.3,0.5, not 0.5,0.3"]),
        ({"mask_prob": "0.3"}, ["--mask-prob 0.3,0.5, not 0.3"]),
        ({"random_prob": "0.1,0.25"}, ["--random-prob 0.1,0.2, not 0.1,0.25"]),
        ({"random_prob": "0"}, ["--random-prob 0.1,0.2, not 0"]),
    ):
        assert differences(plan, loaded, request_for(loaded, text, **{**asked, **change})) == said


def test_a_scale_that_the_pilot_found_for_each_hook_point_is_not_one_that_was_asked_for(loaded, text):
    plan, _ = make_plan(loaded, request_for(loaded, text, layers="0,1"))
    plan = replace(plan, hooks=(plan.hooks[0], replace(plan.hooks[1], scale_factor=4.0)))
    assert differences(plan, loaded, request_for(loaded, text, layers="0,1")) == []
    asked = request_for(loaded, text, layers="0,1", scale_factor=1.0)
    assert differences(plan, loaded, asked) == ["--scale-factor 1.0,4.0, not 1.0,1.0"]


def test_a_plan_differs_for_another_text_or_model(loaded, text, planned, tmp_path):
    other = write_text(tmp_path / "other.txt", 400)
    assert "--dataset 'text.txt', not 'other.txt'" in differences(planned, loaded, request_for(loaded, other))
    gpt2 = load_model(str(save_model(tmp_path / "gpt2", "gpt2")))
    unlike = differences(planned, gpt2, request_for(gpt2, text))
    assert unlike[0].startswith("--model ")
    assert any(line.startswith("the revision of --model") for line in unlike)


def test_a_model_in_another_dtype_or_attention_says_so(loaded, text, planned, tmp_path):
    halved = load_model(loaded.name, dtype="bfloat16")
    assert differences(planned, halved, request_for(halved, text)) == ["--dtype 'float32', not 'bfloat16'"]
    eager = load_model(loaded.name, attention="eager")
    assert differences(planned, eager, request_for(eager, text)) == ["--attention 'sdpa', not 'eager'"]


def test_the_same_model_may_lie_in_another_folder(loaded, text, planned, tmp_path):
    moved = load_model(str(shutil.copytree(loaded.name, tmp_path / "moved")))
    assert differences(planned, moved, request_for(moved, text)) == []


def test_a_hub_data_set_is_pinned_and_a_resume_needs_no_hub(loaded, text, planned, monkeypatch):
    """The revision that a resume names is compared with the plan's; one that only the hub could place is refused."""
    commit = "0123456789abcdef" * 2 + "01234567"
    hub = {key: value for key, value in planned.source.items() if key not in ("text_bytes", "text_sha256")}
    plan = replace(planned, source={**hub, "id": "owner/data", "revision": commit, "revision_asked": "v1"})
    monkeypatch.setattr(text_module, "open_text", None)  # nothing opens the text
    for asked in ("owner/data", f"owner/data@{commit}", f"owner/data@{commit[:10]}", "owner/data@v1"):
        assert differences(plan, loaded, request_for(loaded, asked)) == []
    for other in ("v2", "fedcba9876543210", "0"):
        said = differences(plan, loaded, request_for(loaded, f"owner/data@{other}"))
        assert said == [f"--dataset at revision {commit[:12]}, not {other}"]
    assert differences(plan, loaded, request_for(loaded, "owner/others"))[0].startswith("--dataset 'owner/data', not")


def test_the_revision_of_a_hub_data_set_is_in_the_plan(loaded, monkeypatch):
    documents = iter(random_documents(400))
    hub = text_module.Text(id="owner/data", revision="c0ffee" * 6, documents=documents)
    monkeypatch.setattr(planning, "open_text", lambda dataset, seed: hub)
    plan, _ = make_plan(loaded, request_for(loaded, "owner/data@main"))
    assert (plan.source["id"], plan.source["revision"]) == ("owner/data", "c0ffee" * 6)
    assert plan.source["revision_asked"] == "main"


def test_a_cache_begun_in_an_older_format_is_one_sentence(loaded, text, planned):
    old = replace(planned, spec_version="1.0")
    with pytest.raises(CacheConflict, match=r"begun in format 1\.0 .* finish it with the granary that began it, or"):
        differences(old, loaded, request_for(loaded, text))


def test_more_tokens_than_a_cache_can_number_are_refused(loaded, text):
    with pytest.raises(UserError, match=r"windows are more than 4294967295"):
        outline(loaded, request_for(loaded, text, tokens="200_000B", context=2))


def test_the_seed_changes_what_is_drawn_and_not_how_many(loaded, text):
    (plan, windows), (other, others) = (make_plan(loaded, request_for(loaded, text, seed=seed)) for seed in (0, 1))
    assert plan.n_rows == other.n_rows
    assert plan.cache_id != other.cache_id
    assert not np.array_equal(windows.tokens, others.tokens)


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


@pytest.mark.parametrize("change", [{"pad_token": "w1"}, {"additional": "w2"}, {"bos_token": "w3"}])
def test_other_special_tokens_make_another_tokenizer(tmp_path, text, change):
    """They decide which tokens are masked and flagged, in shards that are still to be made."""
    loaded = load_model(str(save_model(tmp_path)))
    plan, _ = make_plan(loaded, request_for(loaded, text))
    if "additional" in change:
        loaded.tokenizer.add_special_tokens({"additional_special_tokens": [change["additional"]]})
    else:
        loaded.tokenizer.add_special_tokens(change)
    (said,) = differences(plan, loaded, request_for(loaded, text))
    assert said.startswith("the tokenizer ")
