"""What a model's name leads to: a folder with its config, tokenizer and weights, downloaded first if need be.

Adding a short name is one row of SHORT_NAMES.
"""

import fnmatch
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client that this release of huggingface_hub uses; raised when nothing answers
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cache_spec.errors import UserError
from cache_spec.untrusted import json_of, read_bounded
from harvest import embedded


@dataclass(frozen=True, kw_only=True)
class ShortName:
    """A model people ask for often: its hub id or folder, and what to harvest when nothing else is said."""

    source: str
    layers: str
    dtype: str = "auto"
    dataset: str = "fineweb"
    window_tokens: int = 1024


SHORT_NAMES = {
    "tiny": ShortName(
        source=str(embedded.FOLDER),
        layers=str(embedded.HOOK_POINT),
        dataset="embedded",
        window_tokens=embedded.WINDOW_TOKENS,
    ),
    "pythia-70m": ShortName(source="EleutherAI/pythia-70m-deduped", layers="3", dataset="pile"),
    # The two models of the paper, at its layers and on its text; SAEBench has the same ones.
    "pythia-160m": ShortName(source="EleutherAI/pythia-160m-deduped", layers="8", dataset="pile-cc"),
    "gemma-2-2b": ShortName(source="google/gemma-2-2b", layers="12", dtype="bfloat16", dataset="pile-cc"),
    "gpt2": ShortName(source="openai-community/gpt2", layers="8", dataset="openwebtext"),
    # The literature has settled on no layer of these three: a little past the middle, where the others are read too.
    "qwen3-0.6b": ShortName(source="Qwen/Qwen3-0.6B", layers="14"),  # of 28
    "llama-3.2-1b": ShortName(source="meta-llama/Llama-3.2-1B", layers="9"),  # of 16
    "smollm2-135m": ShortName(source="HuggingFaceTB/SmolLM2-135M", layers="15"),  # of 30
}


def defaults(name: str) -> ShortName:
    """What a model's short name stands for; for any other name, no layers."""
    return SHORT_NAMES.get(name, ShortName(source=name, layers=""))


def lasting_name(name: str) -> str:
    """A name that loads the same model from another working directory; the hub id of a short name."""
    source = defaults(name).source
    if not Path(source).is_dir():
        return source
    return name if name in SHORT_NAMES else str(Path(source).resolve())


def locate(name: str, *, weights: bool = True) -> tuple[Path, str]:
    """(the folder that holds the model, its revision: the hub's commit or "sha256:..." over config and weights).

    What was downloaded before is used as it is, with no look at the network. Without `weights` no weights are
    downloaded. Raises UserError for a name that leads to no model, or to one that cannot be had.
    """
    source = defaults(name).source
    if source and Path(source).is_dir():
        _refuse_incomplete(Path(source), weights)
        return Path(source), _folder_sha256(Path(source))
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", source):
        raise UserError(f"there is no model '{name}' ({_known()})")
    repo, _, revision = source.partition("@")
    folder = _downloaded_before(repo, revision or None)
    if folder is None or not _is_complete(folder, weights):
        with _explained(repo, revision):
            folder = _download(repo, revision or None, weights)
    _refuse_incomplete(folder, weights)
    return folder, folder.name  # .../snapshots/<commit>


_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")  # all but the weights
_TOKENIZER = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken")  # any of them makes one
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ANSWER_SECONDS = 10.0


def _known() -> str:
    return f"short names: {', '.join(SHORT_NAMES)}; or give a hub id (owner/name) or a folder"


def _downloaded_before(repo: str, revision: str | None) -> Path | None:
    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision, local_files_only=True)).parent
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UserError(f"'{repo}' is not a name that the Hugging Face hub allows ({_known()})") from error


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    """The snapshot of one commit: config and tokenizer first, then the weights if they are wanted."""
    # This call is the first because it is not retried: without a network it fails at once, and downloads would
    # only after half a minute.
    info = HfApi().model_info(repo, revision=revision, timeout=_ANSWER_SECONDS)
    names = [file.rfilename for file in info.siblings or ()]
    small = [name for name in names if "/" not in name and any(fnmatch.fnmatch(name, like) for like in _SMALL)]
    if "config.json" not in small:
        raise UserError(f"'{repo}' on the Hugging Face hub has no config.json, so it is no transformers model")
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=small))  # remembers the branch's commit
    if weights:
        wanted = [_SINGLE] if _SINGLE in names else [name for name in weight_files(folder) if name in names]
        if not wanted:
            raise UserError(_no_weights(f"'{repo}'", names))
        snapshot_download(repo, revision=folder.name, allow_patterns=wanted)
    return folder


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    """Say what an answer of the hub means, in a sentence."""
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"'{repo}' is gated: accept its licence at https://huggingface.co/{repo}, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"'{repo}' has no revision '{revision}'; its branches, tags and commits are at "
            f"https://huggingface.co/{repo}/commits/main"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(_unreachable(repo)) from error
    except (HFValidationError, RepositoryNotFoundError, EntryNotFoundError) as error:
        raise UserError(
            f"the Hugging Face hub has no model '{repo}' ({_known()}); if it is private, `hf auth login` first"
        ) from error
    except HfHubHTTPError as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the Hugging Face hub answered for '{repo}': {reason}; try again later") from error
    except HTTPError as error:  # after HfHubHTTPError, which is one: here there was no answer
        raise UserError(_unreachable(repo)) from error


def _unreachable(repo: str) -> str:
    return (
        f"'{repo}' is no folder here and not whole in the download cache, and the Hugging Face hub cannot be reached "
        f"to get it ({_known()})"
    )


def weight_files(folder: Path) -> list[str]:
    """The files that the weights are to be in; none if the folder does not say."""
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    if (folder / _INDEX).is_file():
        return _indexed(folder / _INDEX)
    return []


def _indexed(index: Path) -> list[str]:
    """The files that an index names, all of them beside it."""
    try:
        facts = json_of(read_bounded(index))
    except ValueError as error:
        raise UserError(f"{index} is not JSON ({error}); download the model again") from None
    files = facts.get("weight_map") if isinstance(facts, dict) else None
    names: list[Any] = list(files.values()) if isinstance(files, dict) else [None]
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise UserError(f"{index} does not name files beside it; download the model again")
    return sorted(set(names))


def _is_complete(folder: Path, weights: bool) -> bool:
    """Whether a snapshot has all that is loaded. The weights come last, so with them nothing else is missing."""
    files = weight_files(folder)
    if weights:
        return bool(files) and all((folder / name).is_file() for name in files)
    return bool(files) or _has_tokenizer(folder)


def _has_tokenizer(folder: Path) -> bool:
    return any(path for like in _TOKENIZER for path in folder.glob(like))


def _refuse_incomplete(folder: Path, weights: bool) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"the folder {folder} has no config.json; give one that save_pretrained wrote")
    if not _has_tokenizer(folder):  # transformers would make an empty one
        raise UserError(
            f"the folder {folder} has no tokenizer (tokenizer.json or the like); save the model's tokenizer into it too"
        )
    if not weights:
        return
    files = weight_files(folder)
    if not files:
        raise UserError(_no_weights(f"the folder {folder}", [path.name for path in folder.iterdir()]))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(
            f"the folder {folder} lacks {len(missing)} of the {len(files)} files of its weights, such as "
            f"{missing[0]}; get the whole model"
        )


def _no_weights(what: str, names: list[str]) -> str:
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        return (
            f"{what} has its weights in a pickle only ({pickled[0]}), and opening one can run any code, so granary "
            "does not; load the model with transformers where you trust it, and give the folder that save_pretrained "
            "writes"
        )
    return f"{what} has no weights ({_SINGLE}, or {_INDEX} and the files it names)"


def _folder_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"
