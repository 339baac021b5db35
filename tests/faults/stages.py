"""The four commands as a fault meets them: what each is started with, and what a reader may see of it afterwards."""

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

from evaluate_fixtures import small_cache, write_four_runs
from harvest_fixtures import save_model, write_text
from train_fixtures import DATA, contents, make_training_cache, run_config

from cache_spec import ActivationCache, CacheIncomplete, CacheNotFound, column_types
from cache_spec.files import PARTIAL
from train.checkpoint import _read, checkpoint_step
from train.loader import MixedBatchLoader
from train.names import available
from train.run_folder import COMPLETE, read_facts
from train.sweep import train_sweep

CLAIMED, STORED = "harvest --shard claim", "harvest into a store"
STORE_URL = "GRANARY_FAULT_STORE"  # the variable with the URL of an empty place in a store
FINISHED = 10**9  # more than any step
Progress = dict[str, int]
"""What is committed, by name, and how far each is."""


class Wrong(AssertionError):
    """A promise that was not kept."""


@dataclass(kw_only=True)
class Stage:
    """One command. `arguments(out)`: the command lines that make `out` whole from whatever is there.

    `look(out, whole)`: what is committed there; raises Wrong if anything torn or untrue is taken for whole.
    """

    name: str
    inputs: Path
    arguments: Callable[[Path], list[list[str]]]
    look: Callable[[Path, Path], Progress]
    start: Callable[[Path], object] = lambda out: None
    bring: Callable[[Path], object] = lambda out: None  # to `out` what the command made elsewhere
    n_requests: int = field(default=0, init=False)  # to an object store, of a run without any fault
    whole: Path = field(default=Path(), init=False)  # what a run without any fault made

    def seen(self, out: Path) -> Progress:
        """What is committed at `out`."""
        self.bring(out)
        return self.look(out, self.whole)

    def check_whole(self, out: Path) -> None:
        """Raises Wrong unless every file is there, byte for byte, and no other."""
        self.bring(out)
        found, wanted = contents_of(out), contents_of(self.whole)
        if names := sorted(found.keys() ^ wanted.keys()):
            raise Wrong(f"{self.name}: {names[:5]} are left over or missing")
        if unlike := sorted(name for name in wanted if found[name] != wanted[name]):
            raise Wrong(f"{self.name}: {unlike[:5]} have other bytes")


def contents_of(out: Path) -> dict[str, bytes]:
    """Every file but locks: a cache's is there for good, and a killed export's until the next export of that name."""
    locks = ("_granary/lock", f"{PARTIAL}/lock")
    return {name: data for name, data in contents(out).items() if not name.endswith(locks)}


def make_stage(name: str, folder: Path) -> Stage:
    """A stage and the small inputs it needs, in a new folder."""
    folder.mkdir()
    made = {"harvest": _harvest, "train": _train, "evaluate": _evaluate, "export": _export}
    return (made | {CLAIMED: _claimed, STORED: _stored})[name](folder)


def _words(folder: Path, n_tokens: int) -> list[str]:
    model, text = save_model(folder / "model"), write_text(folder / "text.txt", 400)
    words = ["--layers", "1", "--tokens", str(n_tokens), "--context", "32", "--held-out", "0.2"]
    return ["harvest", "--model", str(model), "--dataset", str(text), *words]


def _harvest(folder: Path) -> Stage:
    words = _words(folder, 6144)
    return Stage(
        name="harvest",
        inputs=folder,
        arguments=lambda out: [[*words, "--out", str(out)]],
        look=look_at_cache,
    )


def _claimed(folder: Path) -> Stage:
    words = [*_words(folder, 6144), "--shard", "claim"]
    return Stage(name=CLAIMED, inputs=folder, arguments=lambda out: [[*words, "--out", str(out)]], look=look_at_cache)


def _stored(folder: Path) -> Stage:
    """Two shards, each an upload and a copy of twenty files; into the bucket whose URL the environment has."""
    words, url = [*_words(folder, 2048), "--shard", "claim"], os.environ[STORE_URL]

    def arguments(out: Path) -> list[list[str]]:
        return [[*words, "--out", f"{url}/{out.name}", "--scratch", str(out / "scratch")]]

    return Stage(
        name=STORED,
        inputs=folder,
        arguments=arguments,
        look=lambda out, whole: look_at_cache(out / "store", whole / "store"),
        bring=lambda out: bring_objects(f"{url}/{out.name}", out / "store"),
    )


def bring_objects(url: str, folder: Path) -> None:
    """All objects below a URL of S3, and no others, as files. By plain requests: obstore and a fork do not go together.

    The server of the tests lets in whoever says who he is.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bucket, _, key = url.removeprefix("s3://").partition("/")
    with closing(HTTPConnection(os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"), timeout=30)) as server:

        def get(path: str) -> bytes:
            server.request("GET", path, headers={"Authorization": "AWS someone"})
            answer = server.getresponse()
            assert answer.status == 200, f"{path}: {answer.status}"
            return answer.read()

        listing = ElementTree.fromstring(get(f"/{bucket}?list-type=2&prefix={quote(key)}/"))
        assert listing.findtext("{*}IsTruncated") == "false"
        for name in (found.text or "" for found in listing.iterfind("{*}Contents/{*}Key")):
            path = folder / name.removeprefix(f"{key}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(get(f"/{bucket}/{quote(name)}"))


def look_at_cache(out: Path, whole: Path) -> Progress:
    """The shards that a reader takes for committed, each compared with the whole cache's."""
    try:
        cache = ActivationCache.open(out)
    except CacheNotFound:
        return {}
    except CacheIncomplete:
        try:
            cache = ActivationCache.open(out, allow_partial=True)
        except CacheIncomplete:
            return {}  # it is being created
    if not whole.exists():
        return {}
    wanted = ActivationCache.open(whole)
    if cache.status == "complete" and len(cache.shards) < wanted.plan.n_shards:
        raise Wrong("a cache that misses shards opened as whole")
    for shard in cache.shards:
        for hook, variant in ((h.name, v.name) for h in wanted.plan.hooks for v in wanted.plan.variants):
            if cache.activations(hook, variant, shard).tobytes() != wanted.activations(hook, variant, shard).tobytes():
                raise Wrong(f"other rows of {hook}/{variant} in shard {shard}")
        for column in column_types(wanted.plan):
            if cache.column(column, shard).tobytes() != wanted.column(column, shard).tobytes():
                raise Wrong(f"another column {column} in shard {shard}")
    return {f"shard {shard}": 1 for shard in cache.shards} | ({"manifest": 1} if cache.status == "complete" else {})


def _train(folder: Path) -> Stage:
    cache = make_training_cache(folder / "cache")
    words = ["--arch", "batchtopk,topk", "--k", "3", "--d-sae", "32", "--masked-fraction", "0,0.5", "--resume"]
    words += ["--batch-size", "32", "--tokens", "960", "--checkpoint-every", "5"]
    return Stage(
        name="train",
        inputs=folder,
        arguments=lambda out: [["train", "--cache", str(cache.path), "--out", str(out), *words]],
        look=look_at_runs,
    )


def look_at_runs(out: Path, whole: Path) -> Progress:
    """How far each run is: FINISHED, or the step of its newest checkpoint, which has to be whole."""
    found: Progress = {}
    for folder in (path for path in (out.iterdir() if out.exists() else ()) if path.is_dir()):
        facts = read_facts(folder)
        if facts is None:
            continue
        if facts["status"] == COMPLETE:
            if whole.exists() and (names := _unlike(folder, whole / folder.name)):
                raise Wrong(f"{folder.name} says that it is complete, and has other {names}")
            found[folder.name] = FINISHED
        elif step := checkpoint_step(folder):
            _read(folder / "state" / f"step_{step:09d}.json")  # raises if it is not whole
            found[folder.name] = step
    return found


def _unlike(folder: Path, wanted: Path) -> list[str]:
    files = ("cfg.json", "sae_weights.safetensors", "run.json", "log.jsonl")
    ours, theirs = contents(folder), contents(wanted)
    return [name for name in files if ours.get(name) != theirs[name]]


def _evaluate(folder: Path) -> Stage:
    cache = small_cache(folder / "cache")
    runs = write_four_runs(folder / "runs", cache)
    return Stage(
        name="evaluate",
        inputs=folder,
        arguments=lambda out: [["evaluate", str(out), "--cache", str(cache.path), "--metrics", "core"]],
        look=look_at_reports,
        start=lambda out: shutil.copytree(runs, out),
    )


def look_at_reports(out: Path, whole: Path) -> Progress:
    """Every report and what is kept of controls: each is there as it has to be, or not there."""
    if not whole.exists():
        return {}
    wanted = contents(whole)
    found = {name: data for name, data in contents(out).items() if not name.endswith(PARTIAL)}
    if unlike := [name for name, data in found.items() if name not in wanted or wanted[name] != data]:
        raise Wrong(f"{unlike[:5]} are there and not as they should be")
    return {name: 1 for name in found if "report" in name or ".evaluate" in name}


def _export(folder: Path) -> Stage:
    run = folder / "runs" / "topk"
    train_sweep(MixedBatchLoader(make_training_cache(folder / "cache"), DATA), [run_config("topk")], out=run.parent)

    def arguments(out: Path) -> list[list[str]]:
        there = [name for name in available("formats") if any(_ours(contents_of(out / name)))]
        wanted = [name for name in available("formats") if name not in there]
        return [["train", "export", str(run), "--to", name, "--out", str(out / name)] for name in wanted]

    return Stage(name="export", inputs=folder, arguments=arguments, look=look_at_exports)


def look_at_exports(out: Path, whole: Path) -> Progress:
    """The folders that another tool would find: each is whole."""
    if not out.exists() or not whole.exists():
        return {}
    found: Progress = {}
    for folder in (path for path in out.iterdir() if not path.name.endswith(PARTIAL)):
        if inside := _ours(contents(folder)):
            if inside != contents(whole / folder.name):
                raise Wrong(f"{folder.name} is half a folder")
            found[folder.name] = 1
    return found


def _ours(found: Progress | dict[str, bytes]) -> dict:
    """Without what is under a temporary name."""
    return {name: data for name, data in found.items() if PARTIAL not in name}
