"""Several ranks that train from a URL: what one process makes of the folder, and each file comes once to a machine."""

import json
import os
from pathlib import Path

import pytest
from parallel_fixtures import logs, ranks
from safetensors.torch import load_file
from store_fixtures import IMPATIENT, Proxy
from train_fixtures import DATA, contents, make_training_cache, run_config

from cache_spec.copies import Copies
from cache_spec.remote import open_cache
from cache_spec.store import open_store
from train.loader import MixedBatchLoader
from train.run_folder import load_run
from train.sweep import train_sweep

RUNS = [run_config(), run_config("topk", name="masked", masked_fraction=0.5), run_config("jumprelu")]


def train(team, url: str, variables: dict[str, str], copies: Path, out: Path) -> None:
    os.environ.update(variables)  # the server that ranks are forked from was started before there was a store
    cache = open_cache(url, Copies(folder=copies, n_bytes=10**7, patience=IMPATIENT))
    train_sweep(MixedBatchLoader(cache, DATA, team=team), RUNS, out=out, kernel="dense", team=team)


def downloads(proxy: Proxy) -> list[str]:
    """The requests for columns, moments and rows since the last look; a range of a file has the file's name."""
    found = sorted(line for line in proxy.requests if line.startswith("GET") and "/c/" in line)
    proxy.requests.clear()
    return found


def facts_of(run: Path) -> tuple[dict, str]:
    """What a run.json says, and apart from it where the cache was."""
    facts = json.loads((run / "run.json").read_text())
    for name in ("crc32c", "git_commit", "files"):
        del facts[name]
    return facts, facts["cache"].pop("path")


@pytest.mark.parametrize("parallel", ["sweep", "data"])
def test_ranks_that_train_from_a_url_fetch_each_file_once_and_end_as_one_process_from_the_folder(
    parallel, store_url, proxy: Proxy, tmp_path
):
    cache = make_training_cache(tmp_path / "cache")
    store = open_store(store_url, IMPATIENT)
    for path in sorted(path for path in cache.path.rglob("*") if path.is_file()):
        store.put(path.relative_to(cache.path).as_posix(), path.read_bytes())
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    train_sweep(MixedBatchLoader(cache, DATA), RUNS, out=tmp_path / "folder", kernel="dense")
    train(None, store_url, variables, tmp_path / "copies of one", tmp_path / "one")
    of_one = downloads(proxy)
    assert of_one, "nothing was fetched"
    codes = ranks(train, 2, parallel, tmp_path, store_url, variables, tmp_path / "copies", tmp_path / "two")
    assert codes == [0, 0], logs(tmp_path)
    assert downloads(proxy) == of_one
    for run in RUNS:
        found, wanted = tmp_path / "two" / run.name, tmp_path / "folder" / run.name
        load_run(found)
        (facts, url), (others, folder) = facts_of(found), facts_of(wanted)
        assert (url, folder) == (store_url, str(cache.path.resolve()))
        if parallel == "data":
            assert facts.pop("spread") == "data over 2 processes"
            tensors = [load_file(each / "sae_weights.safetensors") for each in (found, wanted)]
            assert tensors[0].keys() == tensors[1].keys()
            assert max((tensors[0][name] - tensor).abs().max().item() for name, tensor in tensors[1].items()) < 1e-5
            for each in (facts, others):  # numbers, which differ in rounding
                del each["held_out"], each["calibration"]
        else:
            ours, theirs = contents(found), contents(wanted)
            del ours["run.json"], theirs["run.json"]
            assert ours == theirs
        assert facts == others
