"""Documents of a data set on the Hugging Face hub, streamed, at a recorded revision.

A stream that drops is opened again after a while and goes on behind the last row that it gave.
"""

import io
import sys
from collections.abc import Iterator
from typing import Any

import datasets
import fsspec.compression
import pyarrow
from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # the one that huggingface_hub uses; its name changed between versions
from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from cache_spec.errors import UserError
from harvest.hub_name import HubName
from harvest.local_text import checked_text

_LOOKUPS, _ATTEMPTS = 4, 10  # to find the data set, where a wrong name is likely; to read on, where it is not
_LONGEST_WAIT_S = 60


def open_hub_text(name: HubName, revision: str) -> tuple[str, Iterator[str]]:
    """-> (commit, documents); an empty revision is the newest.

    Raises UserError for a data set that cannot be found or read, or has no such column.
    """
    commit = _commit(name.repo, revision)
    return commit, _documents(name, commit)


def _commit(repo: str, revision: str) -> str:
    try:
        found = _retrying(_LOOKUPS, repo)(HfApi().dataset_info, repo, revision=revision or None, timeout=30)
    except GatedRepoError as error:
        raise _gated(repo) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(f"the Hugging Face hub has no data set '{repo}' (revision {revision or 'main'})") from error
    except HfHubHTTPError as error:
        raise UserError(f"the Hugging Face hub answered for '{repo}': {_reason(error)}; try again later") from error
    except (RetryError, OSError) as error:
        raise UserError(
            f"there is no text at '{repo}' here, and the Hugging Face hub cannot be reached to look for a data set; "
            "give a file or a folder with --dataset, or go online"
        ) from error
    assert found.sha is not None
    return found.sha


def _documents(name: HubName, commit: str) -> Iterator[str]:
    stream = _Stream(name, commit)
    retrying = _retrying(_ATTEMPTS, name.repo)
    try:
        while (row := retrying(stream.next_row)) is not None:
            if not name.pile_set or _pile_set(row, name) == name.pile_set:
                yield _text_of(row, name, stream.n_rows)
    except RetryError as error:
        reason = _reason(error.last_attempt.exception())
        raise UserError(
            f"the stream of '{name.repo}' dropped {_ATTEMPTS} times in a row at row {stream.n_rows:,} ({reason}); run "
            "the same command again when the connection is better"
        ) from error
    except UserError:
        raise
    except (DatasetsError, OSError, ValueError) as error:  # a missing config or split is a ValueError of `datasets`
        if isinstance(error.__cause__, GatedRepoError):
            raise _gated(name.repo) from error
        raise UserError(f"the data set '{name.repo}' cannot be read: {_reason(error)}") from error


class _Stream:
    """The rows of a data set, one by one. After an error, `next_row` opens it again behind the last row it gave."""

    def __init__(self, name: HubName, commit: str) -> None:
        self._name, self._commit = name, commit
        self._dataset: IterableDataset | None = None
        self._rows: Iterator[dict[str, Any]] | None = None
        self._place: dict[str, Any] | None = None
        self.n_rows = 0

    def next_row(self) -> dict[str, Any] | None:
        """None at the end."""
        rows, self._rows = self._rows or self._open(), None  # an iterator that failed is never asked again
        assert self._dataset is not None
        row = next(rows, None)
        self._rows, self._place = rows, self._dataset.state_dict()
        self.n_rows += row is not None
        return row

    def _open(self) -> Iterator[dict[str, Any]]:
        _prepare_streaming()
        if self._dataset is None:
            name = self._name
            found = load_dataset(
                name.repo, name.config or None, split=name.split, streaming=True, revision=self._commit
            )
            assert isinstance(found, IterableDataset)
            self._dataset = found
        if self._place is not None:
            self._dataset.load_state_dict(self._place)
        return iter(self._dataset)


def _prepare_streaming() -> None:
    """Let a dropped stream reach us, and read .zst with what is at hand.

    `datasets` would read on from the file that failed, twenty times at equal distances. Opening it anew at a known row
    is right for what was in the middle of a decompression too, and one place waits and says so.
    """
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
    if "zstd" not in fsspec.compression.available_compressions():
        fsspec.compression.register_compression("zstd", _open_zstd, "zst")


def _open_zstd(file: Any, mode: str, **_: Any) -> io.BufferedReader:
    assert "r" in mode
    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))


def _retrying(n_attempts: int, repo: str) -> Retrying:
    """Calls again, later and later, what failed for a reason that passes; RetryError when that was in vain."""

    def say(state: RetryCallState) -> None:
        assert state.outcome is not None
        print(
            f"text      '{repo}': {_reason(state.outcome.exception())}; goes on in {state.upcoming_sleep:.0f} s "
            f"(attempt {state.attempt_number + 1} of {n_attempts})",
            file=sys.stderr,
            flush=True,
        )

    return Retrying(
        retry=retry_if_exception(passes),
        wait=wait_random_exponential(max=_LONGEST_WAIT_S, min=1),
        stop=stop_after_attempt(n_attempts),
        before_sleep=say,
    )


def passes(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, may be gone later: a connection, a time limit, a server that is busy."""
    if error is None or isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return False
    return isinstance(error, (ConnectionError, TimeoutError, httpx.TransportError)) or passes(error.__cause__)


def _pile_set(row: dict[str, Any], name: HubName) -> str:
    try:
        return row["meta"]["pile_set_name"]
    except (KeyError, TypeError) as error:
        raise UserError(f"the rows of '{name.repo}' do not say in meta.pile_set_name which part they are of") from error


def _text_of(row: dict[str, Any], name: HubName, number: int) -> str:
    if name.column not in row:
        spelled = f"{name.repo}:{name.config}" if name.config else name.repo
        raise UserError(
            f"the data set '{name.repo}' has no column '{name.column}', only {', '.join(row)}; "
            f"name one of them as {spelled}#{next(iter(row))}"
        )
    return checked_text(row[name.column], f"row {number:,} of '{name.repo}'", name.column)


def _gated(repo: str) -> UserError:
    return UserError(
        f"the data set '{repo}' is gated: accept its terms at https://huggingface.co/datasets/{repo}, "
        "then `hf auth login`"
    )


def _reason(error: BaseException | None) -> str:
    text = str(error).strip().split("\n")[0]
    return text or type(error).__name__
