"""How a data set of the Hugging Face hub is spelled, and the presets: data sets of the literature by a short name.

Apart from `harvest.hub_text`, for a plan needs the names and not the most of a second that `datasets` takes to import.
"""

import re
from dataclasses import dataclass

_SPELLING = re.compile(
    r"(?P<repo>[^/\s:#@]+/[^/\s:#@]+)(:(?P<config>[^:#@\s]*))?(:(?P<split>[^:#@\s]+))?(#(?P<column>[^#@]+))?"
)


@dataclass(frozen=True, kw_only=True)
class HubName:
    """Which rows of which hub data set are the documents; with `pile_set`, only those of that part of the Pile."""

    repo: str
    config: str = ""
    split: str = "train"
    column: str = "text"
    pile_set: str = ""


PRESETS = {
    "fineweb": HubName(repo="HuggingFaceFW/fineweb", config="sample-10BT"),
    "openwebtext": HubName(repo="Skylion007/openwebtext"),
    "pile": HubName(repo="monology/pile-uncopyrighted"),
    # The paper's "Pile-CC-deduplicated" names no hub id. This is our reading of it: the Common Crawl part of the Pile,
    # which the Pile's makers deduplicated, from the copy of the Pile that is still on the hub.
    "pile-cc": HubName(repo="monology/pile-uncopyrighted", pile_set="Pile-CC"),
}


def parse_hub_name(dataset: str) -> HubName | None:
    """A preset's name or `owner/name[:config[:split]][#column]`, with or without `@revision`; None for other text."""
    name = dataset.partition("@")[0]
    if name in PRESETS:
        return PRESETS[name]
    match = _SPELLING.fullmatch(name)
    return HubName(**{part: text for part, text in match.groupdict().items() if text}) if match else None


def hub_id(dataset: str) -> str:
    """What a plan calls it: the spelling without the revision; of a preset, its name and hub id."""
    name = dataset.partition("@")[0]
    return f"{name} ({PRESETS[name].repo})" if name in PRESETS else name
