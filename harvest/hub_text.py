"""Documents of a data set on the Hugging Face hub, streamed, at a recorded revision."""

from collections.abc import Iterator
from pathlib import Path

from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cache_spec.errors import UserError


def open_hub_text(dataset: str) -> tuple[str, Iterator[str]]:
    """`owner/name[:config][@revision]` -> (commit, documents of the split "train", from the column "text").

    Raises UserError for a data set that cannot be found or read, or has no such column.
    """
    name, _, revision = dataset.partition("@")
    repo, _, config = name.partition(":")
    commit = _commit(repo, revision)
    return commit, _documents(repo, config, commit)


def _commit(repo: str, revision: str) -> str:
    try:
        # Every hub repository has this file; its place in the download folder names the commit.
        file = hf_hub_download(repo, ".gitattributes", repo_type="dataset", revision=revision or None)
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"there is no text at '{repo}' here, and the Hugging Face hub cannot be reached to look for a data set; "
            "give a .txt, a .jsonl or a folder of them with --dataset"
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"the data set '{repo}' is gated: accept its terms at https://huggingface.co/datasets/{repo}, "
            "then `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise UserError(f"the Hugging Face hub has no data set '{repo}' (revision {revision or 'main'})") from error
    except HfHubHTTPError as error:
        raise UserError(f"the Hugging Face hub answered for '{repo}': {error}; try again later") from error
    return Path(file).parent.name  # .../snapshots/<commit>/.gitattributes


def _documents(repo: str, config: str, commit: str) -> Iterator[str]:
    try:
        rows = load_dataset(repo, config or None, split="train", streaming=True, revision=commit)
        assert isinstance(rows, IterableDataset)
        for row in rows:
            if "text" not in row:
                raise UserError(f"the data set '{repo}' has no column 'text', only {', '.join(row)}; give another")
            yield row["text"]
    except UserError:
        raise
    except (DatasetsError, OSError, ValueError) as error:  # a missing config or split is a ValueError of `datasets`
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the data set '{repo}' cannot be read: {reason}") from error
