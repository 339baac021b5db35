"""What a name leads to: a folder, or one sentence that says why not."""

import importlib
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harvest_fixtures import save_model
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

from cache_spec import HookPoint, UserError
from harvest import embedded
from harvest import locate as locate_module
from harvest.locate import SHORT_NAMES, defaults, lasting_name, locate

COMMIT = "0123abc"
client = importlib.import_module(HTTPError.__module__.partition(".")[0])  # httpx, or what huggingface_hub calls it now


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), "llama")


def answer(status: int):
    return client.Response(status, request=client.Request("GET", "https://huggingface.co/owner/name"))


class Hub:
    """Stands in for the Hugging Face hub: holds the files of `folder`, and downloads into a cache below `cache`."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.snapshot = folder, cache / "snapshots" / COMMIT
        self.calls: list[str] = []
        self.revisions: list[str | None] = []
        self.refuse: dict[str, Exception] = {}  # the call, or a part of a file's name -> what is raised

    def local(self, repo, file, *, revision=None, local_files_only=False):
        assert local_files_only
        if not (self.snapshot / file).exists():
            raise LocalEntryNotFoundError("not here")
        return str(self.snapshot / file)

    def info(self, repo, *, revision=None, timeout=None):
        assert timeout is not None
        assert timeout <= 10
        self._meet("info")
        names = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in sorted(names)])

    def download(self, repo, *, revision, allow_patterns):
        self.revisions.append(revision)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            self._meet(name)
            shutil.copy(self.folder / name, self.snapshot / name)
        return str(self.snapshot)

    def _meet(self, call: str) -> None:
        self.calls.append(call)
        for part, error in self.refuse.items():
            if part in call:
                raise error


@pytest.fixture
def hub(monkeypatch, tmp_path, folder) -> Hub:
    hub = Hub(shutil.copytree(folder, tmp_path / "on_the_hub"), tmp_path / "cache")
    monkeypatch.setattr(locate_module, "hf_hub_download", hub.local)
    monkeypatch.setattr(locate_module, "snapshot_download", hub.download)
    monkeypatch.setattr(locate_module, "HfApi", lambda: SimpleNamespace(model_info=hub.info))
    return hub


def split_weights(folder: Path) -> list[str]:
    """Rewrite one file of weights as two and an index."""
    weights, files = load_file(folder / "model.safetensors"), ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    placed = {name: files[i % 2] for i, name in enumerate(sorted(weights))}
    for file in files:
        save_file({name: weights[name] for name in weights if placed[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return files


# ---- short names


def test_the_short_names_are_those_of_the_literature():
    known = {name: (row.source, row.layers, row.dtype, row.dataset) for name, row in SHORT_NAMES.items()}
    assert known["pythia-160m"] == ("EleutherAI/pythia-160m-deduped", "8", "auto", "pile-cc")
    assert known["gemma-2-2b"] == ("google/gemma-2-2b", "12", "bfloat16", "pile-cc")
    assert known["pythia-70m"] == ("EleutherAI/pythia-70m-deduped", "3", "auto", "pile")
    assert known["gpt2"] == ("openai-community/gpt2", "8", "auto", "openwebtext")
    others = {"qwen3-0.6b": "Qwen/Qwen3-0.6B", "llama-3.2-1b": "meta-llama/Llama-3.2-1B"}
    others |= {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M"}
    for name, source in others.items():
        assert (known[name][0], known[name][3]) == (source, "fineweb")
    assert set(known) == {"tiny", "pythia-160m", "pythia-70m", "gemma-2-2b", "gpt2", *others}


def test_every_short_name_has_a_layer_and_a_window():
    for row in SHORT_NAMES.values():
        assert HookPoint.parse(row.layers).layer >= 1
        assert 64 <= row.window_tokens <= 1024


def test_any_other_name_stands_for_itself_and_has_no_layers():
    assert (defaults("owner/name").source, defaults("owner/name").layers) == ("owner/name", "")


def test_a_lasting_name_is_the_hub_id_or_a_whole_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert lasting_name("pythia-160m") == "EleutherAI/pythia-160m-deduped"
    assert lasting_name("owner/name@v1") == "owner/name@v1"
    assert lasting_name(folder.name) == str(folder)
    assert lasting_name("tiny") == "tiny"


# ---- folders


def test_the_embedded_model_is_a_folder_of_ours():
    folder, revision = locate("tiny")
    assert folder == embedded.FOLDER
    assert revision.startswith("sha256:")


def test_the_revision_of_a_folder_follows_config_and_weights_and_nothing_else(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = locate(str(copy))[1]
    assert before == locate(str(folder))[1]
    (copy / "notes.txt").write_text("mine")
    assert locate(str(copy))[1] == before
    weights = load_file(copy / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    changed = locate(str(copy))[1]
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert len({before, changed, locate(str(copy))[1]}) == 3


def test_a_folder_without_a_config_says_so(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json; give one that save_pretrained wrote"):
        locate(str(tmp_path))


def test_a_folder_without_weights_says_what_was_looked_for(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights \(model.safetensors, or model.safetensors.index.json"):
        locate(str(copy))
    assert locate(str(copy), weights=False)[0] == copy


@pytest.mark.parametrize("weights", [True, False])
def test_a_folder_without_a_tokenizer_says_so(folder, tmp_path, weights):
    """Transformers makes an empty tokenizer instead."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    assert (copy / "tokenizer_config.json").is_file()
    with pytest.raises(UserError, match=r"has no tokenizer .*; save the model's tokenizer into it"):
        locate(str(copy), weights=weights)


def test_pickled_weights_are_not_opened(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"in a pickle only \(pytorch_model.bin\).*the folder that save_pretrained"):
        locate(str(copy))


def test_weights_in_several_files_are_whole_or_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    files = split_weights(copy)
    assert locate(str(copy))[0] == copy
    (copy / files[1]).unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of the 2 files of its weights, such as {files[1]}"):
        locate(str(copy))


@pytest.mark.parametrize("name", ["pythia160m", "no such model", "", "/nowhere/at/all", "a/b/c"])
def test_an_unknown_name_lists_the_short_names(name):
    with pytest.raises(UserError, match=r"there is no model .* \(short names: tiny, .*gemma-2-2b.* or give a hub id"):
        locate(name)


@pytest.mark.parametrize("name", ["owner/na:me", "-owner/name", "owner/name..git"])
def test_a_name_the_hub_does_not_allow_says_so(name):
    with pytest.raises(UserError, match="is not a name that the Hugging Face hub allows"):
        locate(name)


# ---- the hub


def test_a_model_is_downloaded_once_weights_last_and_its_commit_is_its_revision(hub):
    found, revision = locate("owner/name")
    assert (found, revision) == (hub.snapshot, COMMIT)
    assert hub.calls[0] == "info"
    assert hub.calls[-1] == "model.safetensors"
    assert {"config.json", "tokenizer.json"} <= set(hub.calls)
    assert hub.revisions == [None, COMMIT]  # a branch may move while its weights are downloaded
    hub.calls.clear()
    assert locate("owner/name") == (found, revision)
    assert not hub.calls


def test_without_weights_none_are_downloaded(hub):
    found, _ = locate("owner/name", weights=False)
    assert (found / "tokenizer.json").is_file()
    assert not list(found.glob("*.safetensors"))
    hub.calls.clear()
    locate("owner/name", weights=False)
    assert not hub.calls
    locate("owner/name")
    assert "model.safetensors" in hub.calls


def test_only_what_is_needed_is_downloaded(hub):
    for name in ("pytorch_model.bin", "model.onnx", "README.md", "consolidated.safetensors"):
        (hub.folder / name).write_text("x")
    (hub.folder / "original").mkdir()
    (hub.folder / "original" / "params.json").write_text("{}")
    found, _ = locate("owner/name")
    names = {path.name for path in found.iterdir()}
    assert "model.safetensors" in names
    assert not names & {"pytorch_model.bin", "model.onnx", "README.md", "consolidated.safetensors", "original"}


def test_a_download_that_was_interrupted_goes_on(hub):
    files = split_weights(hub.folder)
    hub.refuse = {files[1]: LocalEntryNotFoundError("dropped")}
    with pytest.raises(UserError, match="hub cannot be reached"):
        locate("owner/name")
    hub.refuse = {}
    found, _ = locate("owner/name")
    assert all((found / file).is_file() for file in files)


def test_a_repository_of_pickles_is_refused_before_any_weights_are_downloaded(hub):
    (hub.folder / "model.safetensors").rename(hub.folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"'owner/name' has its weights in a pickle only \(pytorch_model.bin\)"):
        locate("owner/name")
    assert "pytorch_model.bin" not in hub.calls


def test_a_repository_that_is_no_model_says_so(hub):
    (hub.folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"'owner/name' on the Hugging Face hub has no config\.json"):
        locate("owner/name")


GATED = r"'owner/name' is gated: accept its licence at https://huggingface.co/owner/name, then `hf auth login`"
UNREACHABLE = "'owner/name' is no folder here .* hub cannot be reached"


@pytest.mark.parametrize(
    ("at", "error", "sentence"),
    [
        ("info", GatedRepoError("no", response=answer(403)), GATED),
        ("config.json", GatedRepoError("no", response=answer(401)), GATED),
        ("model.safetensors", GatedRepoError("no", response=answer(403)), GATED),  # a licence for the weights alone
        ("info", RevisionNotFoundError("no", response=answer(404)), "no revision 'v9'; its branches.*/commits/main"),
        ("info", RepositoryNotFoundError("no", response=answer(401)), "no model 'owner/name' .*private, `hf auth"),
        ("tokenizer", EntryNotFoundError("no"), "hub has no model 'owner/name'"),
        ("info", HfHubHTTPError("503 busy\nmore", response=answer(503)), "answered for 'owner/name': 503 busy; try"),
        ("info", client.ConnectError("name or service not known"), UNREACHABLE),
        ("info", client.ReadTimeout("too slow"), UNREACHABLE),
        ("model.safetensors", client.ReadError("dropped"), UNREACHABLE),
        ("model.safetensors", LocalEntryNotFoundError("dropped"), UNREACHABLE),
    ],
)
def test_every_answer_of_the_hub_is_one_sentence(hub, at, error, sentence):
    hub.refuse = {at: error}
    with pytest.raises(UserError, match=sentence) as caught:
        locate("owner/name@v9")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("name", ["owner/name", "pythia-160m"])
def test_without_a_network_the_answer_comes_at_once(monkeypatch, tmp_path, name, offline):
    """The hub's own downloads would retry for half a minute first."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(locate_module, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    start = time.monotonic()
    with pytest.raises(UserError, match=f"'{defaults(name).source}' is no folder here .*hub cannot be reached"):
        locate(name)
    assert time.monotonic() - start < 5
