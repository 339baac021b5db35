"""The Hugging Face hub: list, fetch and commit the files of a repository, and its refusals as one sentence each.

Only this module knows the hub for pushing and pulling, so `train` pushes without a network library of its own.
huggingface_hub is imported when it is needed: reading a cache needs none. It finds the token (`hf auth login` or
HF_TOKEN) and the address (HF_ENDPOINT) itself; neither passes through here.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cache_spec.errors import UserError

README, ATTRIBUTES = "README.md", ".gitattributes"  # what the hub makes of its own
_ANSWER_SECONDS = 30.0
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOGIN = "`hf auth login`, or put a token that may write into HF_TOKEN"


class HubError(UserError):
    """The hub said no or did not answer. What has arrived there or here stays."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository by its name, owner/name, and kind. It need not be there."""

    name: str
    kind: Literal["model", "dataset"]

    def __post_init__(self) -> None:
        parts = self.name.split("/")
        if not _NAME.fullmatch(self.name) or any(len(part) > 96 or not _allowed(part) for part in parts):
            raise UserError(f"'{self.name}' is no name of a repository on the Hugging Face hub; give owner/name")

    @property
    def page(self) -> str:
        """Where people look at it, without the address."""
        return f"datasets/{self.name}" if self.kind == "dataset" else self.name


def _allowed(part: str) -> bool:
    return "--" not in part and ".." not in part and not part.endswith((".git", ".", "-"))


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file as the hub lists it: its git hash, or the SHA-256 of its content where that is stored apart."""

    oid: str
    sha256: str | None
    size: int

    def holds(self, data: bytes) -> bool:
        """Whether it is these bytes."""
        if self.sha256 is not None:
            return self.sha256 == hashlib.sha256(data).hexdigest()
        return self.oid == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A repository as it was found: the commit, whether others can see it, and its files."""

    commit: str
    private: bool
    files: Mapping[str, RemoteFile]


def look(repository: Repository, revision: str | None = None) -> Remote | None:
    """What a repository holds; None if it is not there, or is hidden from us."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    api, kind = HfApi(), repository.kind
    with explained(repository):
        try:
            info = api.repo_info(repository.name, repo_type=kind, revision=revision, timeout=_ANSWER_SECONDS)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None
        listed = api.list_repo_tree(repository.name, repo_type=kind, revision=info.sha, recursive=True)
        files = {
            entry.path: RemoteFile(oid=entry.blob_id, sha256=entry.lfs.sha256 if entry.lfs else None, size=entry.size)
            for entry in listed
            if isinstance(entry, RepoFile)
        }
    return Remote(commit=str(info.sha), private=bool(info.private), files=files)


def make(repository: Repository, *, private: bool) -> Remote:
    """Make a repository that is not there. Raises HubError if we may not."""
    from huggingface_hub import HfApi

    with explained(repository):
        HfApi().create_repo(repository.name, repo_type=repository.kind, private=private, exist_ok=True)
    found = look(repository)
    if found is None:
        raise HubError(f"the hub made '{repository.name}' and does not show it; run the command again in a minute")
    return found


def check_login() -> None:
    """Raises UserError, before anything is sent, if there is no token to write with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"pushing needs a login to the Hugging Face hub and there is none; {_LOGIN}")


def check_visibility(repository: Repository, found: Remote, *, private: bool) -> None:
    """Raises UserError if a push that is to be private would be seen by all."""
    if private and not found.private:
        raise UserError(
            f"--private was asked and '{repository.name}' is there and public; make it private in its settings on the "
            "hub, or give another --repo"
        )


def commit(repository: Repository, files: Mapping[str, Path | bytes], message: str) -> None:
    """Add or replace files in one commit: readers see all of them or none. What is there already is not sent again."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # ours tells how far it is, on a terminal and in a log
    with explained(repository):
        HfApi().create_commit(
            repository.name,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()],
            commit_message=message,
            repo_type=repository.kind,
        )


def fetch(repository: Repository, file: str, commit: str, folder: Path) -> Path:
    """The file as of a commit, below `folder`. One that is there is not fetched again, and one cut off goes on."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with explained(repository):
        path = HfApi().hf_hub_download(
            repository.name, file, repo_type=repository.kind, revision=commit, local_dir=folder
        )
    return Path(path)


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Turn what the hub's library raises into a HubError of one sentence."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    name = repository.name
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"'{name}' is gated: accept its terms at https://huggingface.co/{repository.page}, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"'{name}' has no such revision; its commits are on its page on the hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(_no_answer(name)) from error
    except EntryNotFoundError as error:
        raise HubError(f"'{name}' lacks a file that it should hold: {_first_line(error)}; push it again") from error
    except HfHubHTTPError as error:
        raise HubError(_refusal(repository, error.response.status_code, _first_line(error))) from error
    except HTTPError as error:  # after HfHubHTTPError, which is one: here there was no answer
        raise HubError(_no_answer(name)) from error
    except OSError as error:  # a transfer that came to an end too early has no number; what the disk says has one
        if error.errno is not None:
            raise
        raise HubError(f"the transfer with '{name}' broke off ({_first_line(error)}); {_AGAIN}") from error
    except RuntimeError as error:  # uploads end so, whatever ended them
        why = error.__cause__ or error
        if isinstance(why, HfHubHTTPError):
            raise HubError(_refusal(repository, why.response.status_code, _first_line(why))) from error
        raise HubError(f"the transfer with '{name}' broke off ({_first_line(why)}); {_AGAIN}") from error


_AGAIN = "run the same command again, it goes on from what has arrived"


def _refusal(repository: Repository, status: int, reason: str) -> str:
    name = repository.name
    if status == 401:
        return f"the hub does not know who asks for '{name}' (401); {_LOGIN}"
    if status == 403:
        return f"the hub forbids it (403): '{name}' is not yours, or your token may not write; give another --repo"
    if status == 404:
        return f"the hub has no {repository.kind} '{name}' (404), or hides it from you; check the name and your login"
    return f"the hub answered {status} for '{name}' ({reason}); {_AGAIN} later"


def _no_answer(name: str) -> str:
    return f"the Hugging Face hub did not answer for '{name}' (no network, or HF_HUB_OFFLINE is set); {_AGAIN}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
