"""What a command line says, read as what it means, where typer does not know."""

from pathlib import Path

import typer

from cache_spec.store_url import is_url


def path(text: str) -> Path:
    """A path on this machine. Python would take a URL for one, and `s3://bucket/runs` for the folder `s3:`."""
    if is_url(text):
        raise typer.BadParameter(
            "it is a URL, and a path on this machine is wanted; docs/stores.md says which commands take a URL"
        )
    return Path(text)
