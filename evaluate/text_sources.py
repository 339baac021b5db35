"""Text of the user's own that runs are measured on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TextSources:
    """Where labelled and shifted text comes from.

    probe_data: files or folders of labelled text (docs/probing.md). sae_probes: also the public out-of-distribution
    sets of an installed sae-probes package. shifted_text: text of another distribution, to reconstruct.
    """

    probe_data: tuple[Path, ...] = ()
    sae_probes: bool = False
    shifted_text: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.probe_data) or self.sae_probes or self.shifted_text is not None

    def facts(self) -> dict[str, object]:
        """What decides the text, to tell whether a measurement was made with the same."""
        return {
            "probe_data": [_content(path) for path in self.probe_data],
            "sae_probes": self.sae_probes,
            "shifted_text": None if self.shifted_text is None else _content(self.shifted_text),
        }


def _content(path: Path) -> list[list[str]]:
    """Names and hashes of the files at `path`, itself a file or a folder of them."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files if file.is_file()]
