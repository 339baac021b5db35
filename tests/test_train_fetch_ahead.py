"""Training from a URL: the same bits as from a folder, whatever the network does, and files come before their rows."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loader_fixtures import make_loader_cache
from store_fixtures import IMPATIENT, Proxy
from train_fixtures import DATA, contents, make_training_cache, run_config

from cache_spec import CacheDamaged, UserError
from cache_spec.copies import Copies
from cache_spec.errors import RoomTooSmall
from cache_spec.layout import activation_file
from cache_spec.mirror import Mirror
from cache_spec.remote import open_cache
from cache_spec.store import open_store
from train.checkpoint import checkpoint_step
from train.command import run
from train.fetch_ahead import FetchAhead
from train.loader import MixedBatchLoader
from train.mixing import BOTH, CLEAN
from train.options import Options
from train.readers import File
from train.sweep import Unfinished, train_sweep

SMALL = replace(DATA, batch_size=16, n_tokens=16 * 100, open_shards=2)  # three epochs of ten shards


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_loader_cache(tmp_path_factory.mktemp("ahead") / "cache.zarr", n_rows=64 * 12, n_train=64 * 10)


def remote(folder: Path, copies: Path, n_bytes: int = 10**9):
    return open_cache(f"file://{folder}", Copies(folder=copies, n_bytes=n_bytes, patience=IMPATIENT))


def shard_bytes(cache) -> int:
    return cache.records[0]["files"][activation_file("layer_1", "clean", 0)]["bytes"]


def shards_below(root: Path) -> list[Path]:
    return [path for variant in ("clean", "masked") for path in root.rglob(f"layer_*/{variant}/c/*/0")]


def check_stream(loader: MixedBatchLoader, plain: MixedBatchLoader, mixtures=BOTH) -> None:
    """Compares every step."""
    with loader.stream(0, loader.n_steps, mixtures) as stream:
        for rows in stream:
            wanted = plain.read(rows.step, with_masked=mixtures is BOTH)
            assert rows.clean.equal(wanted.clean)
            assert (rows.row == wanted.row).all()
            if mixtures is BOTH:
                assert rows.masked is not None
                assert wanted.masked is not None
                assert torch.equal(rows.masked, wanted.masked)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("fetch-ahead", "read-ahead"))]


def soon(ahead: FetchAhead) -> set[File]:
    """The files that the next steps need, as far as it has looked."""
    return {file for file, use in list(ahead._uses.items()) if use.first <= ahead._at + 8}


@pytest.mark.parametrize("n_shards", [3, 4, 7, 100])
@pytest.mark.parametrize("mixtures", [CLEAN, BOTH], ids=["clean", "both"])
def test_rows_are_those_of_the_folder_however_little_fits(cache, tmp_path, n_shards, mixtures):
    both, one = mixtures is BOTH, shard_bytes(cache)
    n_bytes = n_shards * one * (2 if both else 1) + 3000  # and the small files
    loader = MixedBatchLoader(remote(cache.path, tmp_path, n_bytes), SMALL, with_masked=both)
    plain = MixedBatchLoader(cache, SMALL, with_masked=both)
    assert loader.io == "pread"
    assert loader.scale == plain.scale
    check_stream(loader, plain, mixtures)
    assert sum(path.stat().st_size for path in shards_below(tmp_path)) <= n_bytes
    assert loader.read(0, with_masked=both).clean.equal(plain.read(0, with_masked=both).clean)  # and afterwards


def test_a_target_s_files_are_fetched_too_and_the_drop_of_masked_rows_counts_them(cache, tmp_path):
    data = replace(SMALL, target_hook="layer_3", positions="drop_masked", target="clean", n_tokens=16 * 30)
    loader, plain = (MixedBatchLoader(each, data) for each in (remote(cache.path, tmp_path), cache))
    assert (loader.n_rows, loader.target_scale) == (plain.n_rows, plain.target_scale)
    check_stream(loader, plain)


def test_no_file_is_asked_for_by_training_that_was_not_fetched_before(cache, tmp_path, monkeypatch):
    """With room for all, and a training slower than the store, only the first step has to wait."""
    loader = MixedBatchLoader(remote(cache.path, tmp_path), SMALL)
    mirror = loader.cache.files
    assert isinstance(mirror, Mirror)
    fetched, bring = [], mirror._bring
    monkeypatch.setattr(
        mirror, "_bring", lambda file: fetched.append((threading.current_thread().name, file)) or bring(file)
    )
    ahead = loader._fetch_ahead
    assert ahead is not None
    with loader.stream(0, loader.n_steps) as stream:
        for _ in stream:
            deadline = time.monotonic() + 20
            while soon(ahead) - set(ahead._reader.files()) and time.monotonic() < deadline:
                time.sleep(0.001)  # training is slow
    late = [file for name, file in fetched if not name.startswith("fetch-ahead") and "/c/" in file]
    first = (
        loader._files_of(0, BOTH) + loader._files_of(1, BOTH) + loader._files_of(2, BOTH) + loader._files_of(3, BOTH)
    )
    assert {file for file in late if file.startswith("layer")} <= {activation_file(*file) for file in first}
    assert len(fetched) == len({file for _, file in fetched})  # each once


def test_the_sample_asks_for_no_whole_file(cache, tmp_path):
    loader = MixedBatchLoader(remote(cache.path, tmp_path), replace(SMALL, n_tokens=16))
    assert loader.n_rows == MixedBatchLoader(cache, SMALL).n_rows
    assert not shards_below(loader.cache.path)  # the sample is of ranges


def test_too_little_room_for_the_open_shards_is_one_sentence_with_what_is_needed(cache, tmp_path):
    needed = 3 * 2 * shard_bytes(cache)
    with pytest.raises(
        RoomTooSmall, match=rf"too little: training reads 2 shards of .*; give --cache-bytes {needed} or"
    ):
        MixedBatchLoader(remote(cache.path, tmp_path, needed - 1), SMALL)
    MixedBatchLoader(remote(cache.path, tmp_path, needed), SMALL)
    with pytest.raises(UserError, match="--io mmap is for a cache in a folder, not for file:"):
        MixedBatchLoader(remote(cache.path, tmp_path), replace(SMALL, io="mmap"))


def test_two_trainings_share_copies(cache, tmp_path):
    """Each in its own threads, with room for both to go on and not for all; neither takes what the other has open."""
    n_bytes = 9 * 2 * shard_bytes(cache)
    plain, errors = MixedBatchLoader(cache, SMALL), []

    def train(seed: int) -> None:
        try:
            data = replace(SMALL, seed=seed)
            check = plain if seed == 0 else MixedBatchLoader(cache, data)
            loader = MixedBatchLoader(remote(cache.path, tmp_path, n_bytes), data)
            with loader.stream(0, 60) as stream:
                assert all(rows.clean.equal(check.read(rows.step).clean) for rows in stream)
        except BaseException as error:  # noqa: BLE001 (told to the test)
            errors.append(error)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return make_training_cache(tmp_path_factory.mktemp("trained") / "cache.zarr")


def put(folder: Path, url: str) -> None:
    store = open_store(url, IMPATIENT)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path.read_bytes())


RUNS = [run_config(), run_config("topk", name="masked", masked_fraction=0.5)]


def test_a_sweep_from_a_faulty_store_ends_with_the_bits_of_one_from_a_folder(
    training, store_url, proxy: Proxy, tmp_path
):
    put(training.path, store_url)
    for kind in ("drop", "status", "truncate", "corrupt", "slow"):
        proxy.fail(kind, match="/c/", times=3, seconds=0.01)
    opened = open_cache(store_url, Copies(folder=tmp_path / "copies", n_bytes=10**6, patience=IMPATIENT))
    train_sweep(MixedBatchLoader(opened, DATA), RUNS, out=tmp_path / "remote")
    assert proxy.n_failed == 15
    train_sweep(MixedBatchLoader(training, DATA), RUNS, out=tmp_path / "local")
    told, wanted = contents(tmp_path / "remote"), contents(tmp_path / "local")
    for config in RUNS:
        name = f"{config.name}/run.json"
        del told[name], wanted[name]
        facts, others = (json.loads((tmp_path / place / name).read_text()) for place in ("remote", "local"))
        assert facts["cache"].pop("path") == store_url
        assert others["cache"].pop("path") == str(training.path.resolve())
        for each in (facts, others):
            del each["git_commit"], each["crc32c"]
        assert facts == others
    assert told == wanted


def test_a_store_that_goes_away_keeps_every_step_and_says_how_to_go_on(training, store_url, proxy: Proxy, tmp_path):
    put(training.path, store_url)
    n_bytes = 3 * 2 * training.records[0]["files"][activation_file("layer_1", "clean", 0)]["bytes"] + 20_000
    copies = Copies(folder=tmp_path / "copies", n_bytes=n_bytes, patience=IMPATIENT)
    loader = MixedBatchLoader(open_cache(store_url, copies), DATA)
    fill = loader.fill

    def fail(stage, step, mixtures):
        if step == 20:
            proxy.fail("status", for_seconds=60, status=503)
            loader.cache.files.renew(activation_file("layer_1", "clean", 0))
            loader.cache.activations("layer_1", "clean", 0)
        return fill(stage, step, mixtures)

    loader.fill = fail
    with pytest.raises(Unfinished, match=r"did not come through .*--resume"):
        train_sweep(loader, RUNS[:1], out=tmp_path / "runs")
    assert checkpoint_step(tmp_path / "runs" / RUNS[0].name) > 0
    proxy.faults.clear()
    train_sweep(MixedBatchLoader(open_cache(store_url, copies), DATA), RUNS[:1], out=tmp_path / "runs", resume=True)
    train_sweep(MixedBatchLoader(training, DATA), RUNS[:1], out=tmp_path / "local")
    weights = [contents(tmp_path / place)[f"{RUNS[0].name}/sae_weights.safetensors"] for place in ("runs", "local")]
    assert weights[0] == weights[1]


def test_the_command_takes_a_url_and_its_options(training, tmp_path, capsys):
    url = f"file://{training.path}"
    how = {"d_sae": ["32"], "k": ["3"], "tokens": "960", "batch_size": 32}
    run(Options(cache=url, out=tmp_path / "runs", cache_dir=str(tmp_path / "copies"), cache_bytes="1M", **how), set())
    assert url in capsys.readouterr().out
    assert list((tmp_path / "copies").glob("cache.zarr-*/layer_1/clean/c/*/0"))
    with pytest.raises(UserError, match="--cache-bytes is for copies of a cache at a URL"):
        run(Options(cache=str(training.path), out=tmp_path / "others", cache_bytes="1M", **how), set())
    with pytest.raises(UserError, match=r"there is nothing at file:.*nowhere"):
        run(Options(cache=f"file://{tmp_path}/nowhere", out=tmp_path / "others", **how), set())
    assert not (tmp_path / "others").exists()


def test_damage_in_the_store_is_refused_by_name_where_its_rows_are_due(tmp_path):
    folder = make_loader_cache(tmp_path / "cache.zarr", n_rows=64 * 4, n_train=64 * 3).path
    file = folder / activation_file("layer_1", "clean", 1)
    loader = MixedBatchLoader(remote(folder, tmp_path / "copies"), replace(SMALL, n_tokens=16 * 30))
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with (
        pytest.raises(CacheDamaged, match=r"file://.*/layer_1/clean/c/1/0 fails its checksum in rows 64 to"),
        loader.stream(0, 30) as stream,
    ):
        list(stream)
