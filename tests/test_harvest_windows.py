"""Windows: the documents in order, cut and permuted; no document in both splits; nothing lost inside a window."""

import dataclasses
import hashlib
import io
import tracemalloc

import numpy as np
import pytest
from cache_fixtures import make_plan
from harvest_fixtures import make_tokenizer, random_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_spec import CacheDamaged
from cache_spec.seeds import derive_seed
from harvest.windows import DOCS_FILE, TOKENS_FILE, TextTooShort, cut_windows, file_sha256, open_windows, save_windows

GEMMA, NEOX, QWEN = make_tokenizer("gemma2"), make_tokenizer("gpt_neox"), make_tokenizer("qwen3")

DOCUMENTS = random_documents(150)


def joined(documents, tokenizer):
    """The plain way: each document's tokens with EOS at the end."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [[*tokenizer.encode(text, add_special_tokens=False), *eos] for text in documents]


@settings(max_examples=40, deadline=None)
@given(
    n_train=st.integers(1, 20),
    n_held_out=st.integers(0, 6),
    window_tokens=st.integers(2, 40),
    seed=st.integers(0, 2**40),
    tokenizer=st.sampled_from([GEMMA, NEOX, QWEN]),
)
def test_windows_hold_the_documents_of_their_split_in_order(n_train, n_held_out, window_tokens, seed, tokenizer):
    documents = DOCUMENTS[seed % 3 :]
    windows = cut_windows(
        documents, tokenizer, window_tokens=window_tokens, n_train=n_train, n_held_out=n_held_out, seed=seed
    )
    assert windows.tokens.shape == windows.docs.shape == (n_train + n_held_out, window_tokens)
    assert windows.tokens.dtype == windows.docs.dtype == np.uint32
    has_bos = tokenizer.bos_token_id is not None
    if has_bos:
        assert (windows.tokens[:, 0] == tokenizer.bos_token_id).all()
        assert np.array_equal(windows.docs[:, 0], windows.docs[:, 1])
    plain = joined(documents, tokenizer)
    splits = np.split(np.arange(n_train + n_held_out), [n_train])
    used = [set(np.unique(windows.docs[split])) for split in splits]
    assert not used[0] & used[1]
    for split, docs in zip(splits, used, strict=True):
        stream = [(token, doc) for doc in sorted(docs) for token in plain[doc]]
        body = slice(has_bos, None)
        pairs = {
            tuple(zip(windows.tokens[i, body].tolist(), windows.docs[i, body].tolist(), strict=True)) for i in split
        }
        n_cut = window_tokens - has_bos
        assert pairs == {tuple(stream[i * n_cut : (i + 1) * n_cut]) for i in range(len(split))}


def plain_windows(documents, tokenizer, window_tokens, n_train, n_held_out, seed):
    """All at once: join, cut, permute, put BOS before. -> tokens and documents, or what a text too short gave."""
    n_cut = window_tokens - (tokenizer.bos_token_id is not None)
    chooser = np.random.Generator(np.random.Philox(key=derive_seed("harvest/held_out", seed)))
    wanted = {"train": n_train * n_cut, "held_out": n_held_out * n_cut}
    piles, owed, n_documents = {"train": [], "held_out": []}, 0.0, 0
    for number, ids in enumerate(filter(lambda ids: len(ids) > 1, joined(documents, tokenizer))):
        owed += n_held_out / (n_train + n_held_out) * len(ids)
        name = "held_out" if owed > chooser.random() * len(ids) else "train"
        owed -= len(ids) * (name == "held_out")
        if len(piles[name]) < wanted[name]:
            piles[name] += [(token, number) for token in ids]
        n_documents = number + 1
        if all(len(piles[name]) >= wanted[name] for name in piles):
            break
    else:
        return sum(len(pile) // n_cut for pile in piles.values()), n_documents
    rows = []
    for name, pile in piles.items():
        cut = np.asarray(pile[: wanted[name]], np.uint32).reshape(-1, n_cut, 2)
        rows.append(
            np.random.Generator(np.random.Philox(key=derive_seed("harvest/windows", seed, name))).permutation(cut)
        )
    tokens, docs = np.moveaxis(np.concatenate(rows), 2, 0)
    if tokenizer.bos_token_id is not None:
        tokens = np.insert(tokens, 0, tokenizer.bos_token_id, axis=1)
        docs = np.insert(docs, 0, docs[:, 0], axis=1)
    return tokens, docs


@settings(max_examples=60, deadline=None)
@given(
    n_train=st.integers(1, 25),
    n_held_out=st.integers(0, 8),
    window_tokens=st.integers(2, 60),
    n_documents=st.integers(0, 60),
    seed=st.integers(0, 2**40),
    tokenizer=st.sampled_from([GEMMA, NEOX, QWEN]),
)
def test_windows_filled_in_place_are_those_of_the_plain_way(
    n_train, n_held_out, window_tokens, n_documents, seed, tokenizer
):
    documents = ["", *DOCUMENTS[:n_documents]]
    plain = plain_windows(documents, tokenizer, window_tokens, n_train, n_held_out, seed)
    facts = {"window_tokens": window_tokens, "n_train": n_train, "n_held_out": n_held_out, "seed": seed}
    if isinstance(plain[0], int):
        with pytest.raises(TextTooShort) as caught:
            cut_windows(documents, tokenizer, **facts)
        assert (caught.value.n_windows, caught.value.n_documents) == plain
        return
    windows = cut_windows(documents, tokenizer, **facts)
    assert np.array_equal(windows.tokens, plain[0])
    assert np.array_equal(windows.docs, plain[1])
    saved = io.BytesIO()
    np.save(saved, plain[0].copy())
    assert file_sha256(windows.tokens) == hashlib.sha256(saved.getvalue()).hexdigest()


def test_windows_need_eight_bytes_a_token_beside_the_documents_at_hand():
    documents = random_documents(6000)
    n_windows = sum(len(text.split()) for text in documents) // 68
    tracemalloc.start()
    windows = cut_windows(iter(documents), GEMMA, window_tokens=64, n_train=n_windows - 40, n_held_out=30, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert windows.tokens.nbytes + windows.docs.nbytes <= peak < 8 * windows.tokens.size + 2**20


def test_the_windows_of_a_split_are_permuted_by_the_seed():
    def cut(seed):
        return cut_windows(random_documents(300), GEMMA, window_tokens=16, n_train=200, n_held_out=50, seed=seed)

    first, again, other = cut(0), cut(0), cut(1)
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.docs, again.docs)
    assert not np.array_equal(first.tokens, other.tokens)
    for split in (first.docs[:200, 0], first.docs[200:, 0]):
        assert abs(np.corrcoef(np.arange(len(split)), split)[0, 1]) < 0.4  # 1 if they came in order


def test_a_document_as_long_as_a_window_is_a_window():
    """With BOS and no EOS, as in the embedded language."""
    tokenizer = make_tokenizer("gemma2")
    tokenizer.eos_token = None
    documents = [" ".join(f"w{(i + j) % 40}" for j in range(15)) for i in range(60)]
    windows = cut_windows(documents, tokenizer, window_tokens=16, n_train=30, n_held_out=10, seed=0)
    assert (windows.docs == windows.docs[:, :1]).all()
    assert sorted(tokenizer.batch_decode(windows.tokens[:, 1:])) == sorted(documents[doc] for doc in windows.docs[:, 0])


@pytest.mark.parametrize("longest", [3, 60])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_little_more_is_read_than_the_windows_need(longest, share):
    """The held-out share never drifts by more than a document, so neither split waits long for its last window."""
    n_read = 0

    def reading():
        nonlocal n_read
        for text in random_documents(120_000 // longest, longest=longest):
            n_read += len(text.split()) + 1
            yield text

    n_held_out = round(400 * share)
    documents = reading()
    cut_windows(documents, QWEN, window_tokens=32, n_train=400 - n_held_out, n_held_out=n_held_out, seed=0)
    assert n_read <= 400 * 32 + 257 * (longest + 1)  # documents are read 256 at a time


def test_held_out_documents_are_spread_over_the_text():
    windows = cut_windows(random_documents(3000), QWEN, window_tokens=32, n_train=900, n_held_out=100, seed=0)
    held_out = np.unique(windows.docs[900:])
    gaps = np.diff(held_out)
    assert held_out[0] < 100
    assert gaps.max() < 60
    assert len(np.unique(gaps)) > 5  # and not at every n-th


def test_with_nothing_held_out_every_document_trains():
    windows = cut_windows(random_documents(50), QWEN, window_tokens=8, n_train=40, n_held_out=0, seed=0)
    assert np.array_equal(np.unique(windows.docs), np.arange(windows.docs.max() + 1))


def test_documents_without_tokens_are_passed_over():
    documents = ["", "   ", *random_documents(20), ""] * 3
    filled = [text for text in documents if text.strip()]
    cuts = [
        cut_windows(texts, GEMMA, window_tokens=8, n_train=50, n_held_out=9, seed=0) for texts in (documents, filled)
    ]
    assert np.array_equal(cuts[0].tokens, cuts[1].tokens)
    assert np.array_equal(cuts[0].docs, cuts[1].docs)


def test_too_little_text_says_what_there_was():
    with pytest.raises(TextTooShort) as caught:
        cut_windows(["w1 w2 w3"] * 10, QWEN, window_tokens=4, n_train=100, n_held_out=10, seed=0)
    assert caught.value.n_documents == 10
    assert 8 <= caught.value.n_windows <= 10


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "_granary").mkdir()
    windows = cut_windows(random_documents(100), GEMMA, window_tokens=8, n_train=30, n_held_out=10, seed=0)
    sums = {"windows_sha256": file_sha256(windows.tokens), "window_docs_sha256": file_sha256(windows.docs)}
    plan = dataclasses.replace(make_plan(), source={"n_documents": windows.n_documents, **sums})
    save_windows(tmp_path, windows)
    return tmp_path, plan, windows


def test_saved_windows_come_back(saved):
    folder, plan, windows = saved
    again = open_windows(folder, plan)
    assert np.array_equal(again.tokens, windows.tokens)
    assert np.array_equal(again.docs, windows.docs)
    assert again.n_documents == windows.n_documents
    assert sorted(path.name for path in (folder / "_granary").iterdir()) == ["window_docs.npy", "windows.npy"]


@pytest.mark.parametrize("name", [TOKENS_FILE, DOCS_FILE])
def test_windows_that_changed_or_went_missing_are_noticed(saved, name):
    folder, plan, _ = saved
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CacheDamaged, match="changed after it was written"):
        open_windows(folder, plan)
    (folder / name).unlink()
    with pytest.raises(CacheDamaged, match="is missing"):
        open_windows(folder, plan)
