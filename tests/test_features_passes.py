"""What the passes over a cache find, compared with looking at everything at once."""

import numpy as np
import pytest
import torch
from features_fixtures import DEAD, WINDOW, asked_of, reading_of, text_run, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_spec import UserError
from evaluate.features import reading as reading_module
from evaluate.features.collect import N_SAMPLE, collect
from evaluate.features.contexts import ABSENT, read_contexts
from evaluate.features.gather import N_BANDS, PER_BAND, gather
from evaluate.features.lens import load_for_lens, logit_lens, nearest
from evaluate.features.running import N_BINS, Best, bin_edges, bins_of, count_bins
from evaluate.features.selection import N_DEFAULT, select
from evaluate.features.words import Words, words_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The run, its cache, its SAE, and everything there is to know of them."""
    run, cache, sae = text_run(tmp_path_factory.mktemp("features"))
    return run, cache, sae, whole(cache, sae)


def ordinary(everything: dict[str, np.ndarray]) -> np.ndarray:
    return everything["pos"] > 0


def best_of_windows(world, latent: int) -> list[tuple[float, int]]:
    """(value, row) of the best row of each piece of a window in a shard, the largest first."""
    _, cache, _, everything = world
    shard = np.arange(cache.plan.n_rows) // cache.plan.shard_rows
    pieces: dict[tuple[int, int], tuple[float, int]] = {}
    for row in np.flatnonzero(ordinary(everything) & (everything["clean"][:, latent] > 0)):
        key = (int(shard[row]), int(everything["window"][row]))
        pieces[key] = max(pieces.get(key, (0.0, -1)), (float(everything["clean"][row, latent]), int(row)))
    return sorted(pieces.values(), reverse=True)


@pytest.mark.parametrize("batch_rows", [12, 8192])
def test_the_top_examples_are_the_true_maxima_each_of_another_window(world, monkeypatch, batch_rows):
    _, cache, sae, _ = world
    monkeypatch.setattr(reading_module, "_MOST_BATCH_ROWS", batch_rows)
    top = collect(reading_of(cache, sae), n_top=5, seed=0).top
    for latent in range(sae.d_sae):
        wanted = best_of_windows(world, latent)[:5]
        n = len(wanted)
        assert top.rows[latent, :n].tolist() == [row for _, row in wanted]
        assert top.values[latent, :n] == pytest.approx([value for value, _ in wanted])
        assert (top.rows[latent, n:] == -1).all()


def test_counts_sums_and_histograms_are_those_of_all_ordinary_rows(world):
    _, cache, sae, everything = world
    firings = collect(reading_of(cache, sae), n_top=2, seed=0)
    usable = ordinary(everything)
    clean, masked = everything["clean"][usable], everything["masked"][usable]
    assert firings.n_rows == usable.sum()
    assert firings.n_held_out == usable[cache.plan.n_train_rows :].sum()
    assert firings.counts.tolist() == (clean > 0).sum(0).tolist()
    assert firings.masked_counts is not None
    assert firings.masked_counts.tolist() == (masked > 0).sum(0).tolist()
    assert firings.sums == pytest.approx(clean.sum(0), rel=1e-5)
    assert firings.bins.sum(1).tolist() == firings.counts.tolist()
    for own in (0, 1):
        rows = everything["mask"][usable] == own
        fires = clean[rows] > 0
        assert firings.kept[own, 0] == pytest.approx(np.where(fires, clean[rows], 0).sum(0), rel=1e-5)
        assert firings.kept[own, 1] == pytest.approx(np.where(fires, masked[rows], 0).sum(0), rel=1e-5)


def test_a_limit_on_rows_takes_the_held_out_ones_first(world):
    _, cache, sae, everything = world
    n_held_out = int(ordinary(everything)[cache.plan.n_train_rows :].sum())
    few = collect(reading_of(cache, sae, most_rows=n_held_out), n_top=2, seed=0)
    assert few.n_rows == few.n_held_out == n_held_out
    more = collect(reading_of(cache, sae, most_rows=n_held_out + 7), n_top=2, seed=0)
    assert (more.n_rows, more.n_held_out) == (n_held_out + 7, n_held_out)


@pytest.mark.parametrize("most_rows", [10**6, 50])
def test_the_progress_ends_at_the_rows_that_were_to_be_read(world, capsys, most_rows):
    _, cache, sae, _ = world
    n = collect(reading_of(cache, sae, most_rows=most_rows), n_top=2, seed=0).n_rows
    assert f"features: {n}/{n} rows" in capsys.readouterr().err


def test_the_sample_holds_every_firing_where_they_are_few_and_is_the_same_for_a_seed(world):
    _, cache, sae, everything = world
    samples = [collect(reading_of(cache, sae), n_top=1, seed=seed).sample for seed in (0, 0, 1)]
    several = 0
    for latent in range(sae.d_sae):
        fires = np.flatnonzero(ordinary(everything) & (everything["clean"][:, latent] > 0))
        rows = samples[0].rows[latent]
        assert len(set(rows[rows >= 0].tolist())) == min(N_SAMPLE, len(fires))
        assert set(rows[rows >= 0].tolist()) <= set(fires.tolist())
        there = rows >= 0
        assert samples[0].values[latent][there] == pytest.approx(everything["clean"][rows[there], latent])
        several += len(fires) > N_SAMPLE
    assert several
    assert (samples[0].rows == samples[1].rows).all()
    assert (samples[0].rows != samples[2].rows).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.lists(st.integers(0, 40), max_size=6))
def test_the_best_of_a_stream_is_the_head_of_a_stable_sort(seed, n, sizes):
    generator = np.random.default_rng(seed)
    best, said = Best(3, n), []
    for size in sizes:
        latents, keys = generator.integers(3, size=size), generator.integers(8, size=size).astype(np.float32)
        rows = np.arange(len(said), len(said) + size)
        best.offer(latents, keys, keys * 2, rows)
        said += list(zip(latents.tolist(), keys.tolist(), rows.tolist(), strict=True))
    for latent in range(3):
        wanted = sorted((entry for entry in said if entry[0] == latent), key=lambda entry: -entry[1])[:n]
        n_there = len(wanted)
        assert best.rows[latent, :n_there].tolist() == [row for _, _, row in wanted]
        assert best.values[latent, :n_there].tolist() == [2 * key for _, key, _ in wanted]
        assert (best.rows[latent, n_there:] == -1).all()


def test_every_value_falls_between_the_edges_of_its_bin():
    values = np.array([1e-9, 0.001, 1.0, 1.5, 3.99, 4.0, 1e5, 1e9])
    edges, bins = bin_edges(), bins_of(values)
    inner = values[1:-1]
    assert (edges[bins[1:-1]] <= inner).all()
    assert (inner < edges[bins[1:-1] + 1]).all()
    assert (bins[0], bins[-1]) == (0, N_BINS - 1)
    assert count_bins(np.array([1, 1, 0]), np.array([2.0, 2.0, 5.0]), 2).sum(1).tolist() == [1, 2]


def test_contexts_are_one_window_clean_and_masked_with_the_codes_of_its_rows(world):
    _, cache, sae, everything = world
    generator = np.random.default_rng(0)
    rows = generator.choice(np.flatnonzero(ordinary(everything)), 40)
    latents = generator.integers(sae.d_sae, size=40)
    found = read_contexts(reading_of(cache, sae), latents, rows, before=3, after=2)
    assert found.masked_tokens is not None
    assert found.masked_values is not None
    at = {(int(w), int(p)): i for i, (w, p) in enumerate(zip(everything["window"], everything["pos"], strict=True))}
    for example, (latent, row) in enumerate(zip(latents, rows, strict=True)):
        window, position = int(everything["window"][row]), int(everything["pos"][row])
        assert (found.windows[example], found.positions[example]) == (window, position)
        assert found.docs[example] == everything["doc"][row]
        for column in range(6):
            there = position + column - 3
            if not 0 <= there < WINDOW:
                assert found.tokens[example, column] == found.masked_tokens[example, column] == ABSENT
                continue
            other = at[window, there]
            assert found.tokens[example, column] == everything["token"][other]
            assert found.masked_tokens[example, column] == everything["token_masked"][other]
            for shown, variant in ((found.values, "clean"), (found.masked_values, "masked")):
                wanted = everything[variant][other, latent] if there else 0.0  # the first is BOS
                assert shown[example, column] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_quantile_bands_are_fifths_of_the_sample_the_highest_first(world):
    run, *_ = world
    found = gather(asked_of(run))
    shown = next(s for s in found.shown if s.bands)
    assert len(shown.bands) == N_BANDS
    assert sum(band.share for band in shown.bands) == pytest.approx(1)
    for band in shown.bands:
        values = found.contexts.values[list(band.examples), found.contexts.before]
        assert len(values) == PER_BAND
        assert (values >= band.low - 1e-6).all()
        assert (values <= band.high + 1e-6).all()
    lows = [band.low for band in shown.bands]
    assert lows == sorted(lows, reverse=True)
    assert not found.shown[DEAD].top
    assert not found.shown[DEAD].bands


def test_the_lens_is_the_final_norms_weight_on_the_centred_row_times_the_unembedding():
    loaded = load_for_lens("tiny", 96, "cpu")
    rows = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    norm, head = loaded.model.get_submodule(loaded.places.norm), loaded.model.get_output_embeddings()
    unit = rows / rows.norm(dim=1, keepdim=True) * 96**0.5
    centred = unit - unit.mean(1, keepdim=True)
    assert head is not None
    logits = (norm.weight * centred / centred.std(1, keepdim=True, correction=0)) @ head.weight.T
    logits = logits - logits.mean(1, keepdim=True)
    found = logit_lens(loaded, rows * 7)  # the length does not matter
    assert found.top_logits == pytest.approx(logits.topk(10).values.numpy(), abs=1e-3)
    assert found.bottom_logits == pytest.approx(logits.topk(10, largest=False).values.numpy(), abs=1e-3)
    assert (found.top == logits.topk(10).indices.numpy()).all()
    with pytest.raises(UserError, match="96 dimensions, and decoder rows have 6"):
        load_for_lens("tiny", 6, "cpu")


def test_nearest_latents_are_the_largest_cosines_and_never_the_latent_itself():
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 31)[:, None]
    latents = np.array([0, 7, 29])
    found, cosines = nearest(rows, latents, 3)
    units = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    for i, latent in enumerate(latents):
        all_cosines = units @ units[latent]
        all_cosines[latent] = -np.inf
        assert found[i].tolist() == np.argsort(-all_cosines)[:3].tolist()
        assert cosines[i] == pytest.approx(np.sort(all_cosines)[::-1][:3], abs=1e-5)


def test_a_selection_means_what_it_says():
    density = np.array([0.5, 0.0, 0.2, 0.0, 0.9, 0.1])
    assert select("all", density, 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert select("1-3,5, 2", density, 0).tolist() == [1, 2, 3, 5]
    assert select("top:2", density, 0).tolist() == [0, 4]
    assert select("dead", density, 0).tolist() == [1, 3]
    assert select("random:3", density, 1).tolist() == select("random:3", density, 1).tolist()
    assert len(set(select("random", np.zeros(1000), 1).tolist())) == N_DEFAULT


@pytest.mark.parametrize("text", ["", "x", "3-", "5-2", "0-6", "6", "1,,2", "top:0", "dead:x", "best", "-1", "1.5"])
def test_a_selection_that_makes_no_sense_is_one_sentence_that_says_what_does(text):
    with pytest.raises(UserError, match=r"^--latents .*give all, numbers such as 0-99") as error:
        select(text, np.zeros(6), 0)
    assert "\n" not in str(error.value)


def test_words_have_their_spaces_and_numbers_stand_in_for_what_has_none(world):
    _, cache, *_ = world
    words = words_of(cache)
    vocabulary = words.tokenizer.get_vocab()
    assert words.texts([vocabulary["about"], vocabulary["..."]]) == [" about", " ..."]
    assert Words(missing="gone").texts([7]) == ["⟨7⟩"]
    assert words.texts([]) == []


def test_a_cache_of_a_model_that_cannot_be_had_shows_numbers_and_says_why(world, monkeypatch):
    _, cache, *_ = world
    changed = {**cache.plan.model, "id": "no such model", "revision": "0"}
    monkeypatch.setitem(cache.plan.model, "revision", "0")  # pyright: ignore
    monkeypatch.setitem(cache.plan.model, "id", changed["id"])  # pyright: ignore
    words = words_of(cache)
    assert words.tokenizer is None
    assert "there is no model 'no such model'" in words.missing
    with pytest.raises(UserError, match="there is no model 'nor this'"):
        words_of(cache, "nor this")
