"""SAEs of others: folders or hub repositories of SAELens 6, dictionary_learning or sparsify, if computed exactly."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)

from cache_spec import ActivationCache, HookPlan, UserError
from evaluate.cases import REPORT, Case, Place, check_sae, file_hash, safe_name
from evaluate.controls import subject_of_sae
from evaluate.recipes import PRETRAINED, Recipe
from train.foreign import format_of
from train.formats import dictionary_learning, saelens, sparsify
from train.sae import SparseAutoencoder
from train.stored import Stored

_log = logging.getLogger(__name__)
_FILES = (saelens.FILES, dictionary_learning.FILES, sparsify.FILES)  # looked for on the hub in this order
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w./-]+))?")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """An SAE that somebody else trained. name: the folder or hub id as it was given. files: what it was read from."""

    name: str
    files: Sequence[Path]
    sae: SparseAutoencoder
    metadata: Mapping[str, Any]
    k: int = 0  # as it was trained; 0 if it has none

    @property
    def hook_name(self) -> str:
        """Where it says that it reads; empty if it does not say."""
        return str(self.metadata.get("hook_name") or "")


def find_pretrained(text: str) -> Pretrained:
    """The SAE at `folder`, `owner/name` or `owner/name:subfolder` on the hub. Raises UserError if it cannot be had."""
    folder = Path(text) if Path(text).is_dir() else _download(text)
    try:
        module = format_of(folder)
        stored: Stored = module.read(folder)
        if stored.is_transcoder:
            raise UserError("it is a transcoder, and evaluate compares an SAE with its own input; give an SAE")
    except UserError as error:
        raise UserError(f"--sae {text}: {error}") from error
    for note in stored.notes:
        _log.warning("--sae %s: %s", text, note)
    return Pretrained(
        name=text,
        files=[folder / name for name in module.FILES],
        sae=stored.sae,
        metadata=stored.metadata,
        k=stored.k or 0,
    )


def _download(text: str) -> Path:
    """The folder that the hub's two files are in, from its cache where they were fetched before."""
    match = _HUB_ID.fullmatch(text)
    if not match:
        raise UserError(f"--sae {text} is neither a folder nor owner/name or owner/name:subfolder; check the spelling")
    repository, subfolder = match[1], match[2] or ""
    missing: EntryNotFoundError | None = None
    try:
        for files in _FILES:
            try:
                paths = [hf_hub_download(repository, f"{subfolder}/{file}".lstrip("/")) for file in files]
                return Path(paths[-1]).parent
            except EntryNotFoundError as error:  # also where there is no network
                missing = missing or error
        assert missing is not None
        raise missing
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"--sae {text} is not a folder here and cannot be downloaded (offline, or HF_HUB_OFFLINE is set); "
            "check the spelling and the network"
        ) from error
    except (EntryNotFoundError, HfHubHTTPError, HTTPError, HFValidationError, OSError) as error:
        why = str(error).strip().split("\n")[0]
        raise UserError(f"--sae {text} is no folder here, and the hub has no SAE of that name ({why})") from error


def hook_of(pretrained: Pretrained, cache: ActivationCache, given: str) -> HookPlan:
    """The hook point of a cache to measure on: the given one, the SAE's own, or the only one.

    Raises CacheError if the cache does not hold it, and UserError if there are several and nothing says which.
    """
    own = {name: hook for hook in cache.plan.hooks for name in (hook.tl_name, hook.hf_name, hook.hook_point)}
    if given:
        hook = cache.hook(given)
    elif pretrained.hook_name in own:
        hook = own[pretrained.hook_name]
    elif len(cache.plan.hooks) == 1 and not pretrained.hook_name:
        hook = cache.plan.hooks[0]
    else:
        names = ", ".join(hook.name for hook in cache.plan.hooks)
        reads = f"reads {pretrained.hook_name}" if pretrained.hook_name else "does not say where it reads"
        raise UserError(f"--sae {pretrained.name} {reads}, and {cache.place} holds {names}; name one with --hook")
    try:
        check_sae(pretrained.sae, hook)
    except UserError as error:
        raise UserError(f"--sae {pretrained.name}: {error}") from error
    return hook


def pretrained_case(pretrained: Pretrained, place: Place, out: Path) -> Case:
    """A case of its own: measured at its own threshold, and paired with nothing."""
    sae = pretrained.sae
    recipe = Recipe(
        bench=place.name,
        arch=str(pretrained.metadata.get("training_architecture")),
        k=pretrained.k,
        d_sae=sae.d_sae,
        name=pretrained.name,
        kind=PRETRAINED,
    )
    return Case(
        name=pretrained.name,
        recipe=recipe,
        seed=0,
        make=lambda: subject_of_sae(pretrained.name, sae.to(place.device), 0.0, place.bench, seed=place.seed),
        report=out / safe_name(pretrained.name) / REPORT,
        facts={"files": {file.name: file_hash(file) for file in pretrained.files}},
    )
