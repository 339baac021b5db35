"""The model that a cache was made with, by a name that leads to it here."""

from pathlib import Path

from cache_spec import ActivationCache
from harvest.model import load_model

EMBEDDED_MODEL = "tiny"


def name_of_model(cache: ActivationCache) -> tuple[str, bool]:
    """(a name to load it by, whether it is the embedded model).

    The embedded model is known by its content: its folder may have been given instead of its name.
    """
    facts = cache.plan.model
    is_embedded = facts.get("revision") == load_model(EMBEDDED_MODEL, weights=False).revision
    return (EMBEDDED_MODEL if is_embedded else str(facts.get("id"))), is_embedded


def public_name(name: object) -> str:
    """A name for others to read: of a folder or file on this machine, its last part alone."""
    text = str(name)
    return Path(text).name if Path(text).is_absolute() else text
