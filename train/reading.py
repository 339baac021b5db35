"""Reading what the command line says: presets, counts, lists of numbers, the hook point, the device."""

import dataclasses
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from cache_spec.cache import ActivationCache
from cache_spec.errors import CacheDamaged, CacheIncomplete, UserError
from train.grid import Lists
from train.names import find

if TYPE_CHECKING:
    from train.options import Options


def with_preset(options: "Options", given: Set[str]) -> tuple["Options", dict[str, Any]]:
    """The options with those of --preset that were not given, and what it set. Raises UserError for an unknown one."""
    if not options.preset:
        return options, {}
    settings: dict[str, Any] = getattr(find("presets", options.preset), options.preset)()
    chosen = {name: value for name, value in settings.items() if name not in given}
    return dataclasses.replace(options, **chosen), chosen


def read_lists(options: "Options") -> Lists:
    """The lists of a grid. Raises UserError for a number that is none and a list that is empty."""
    return Lists(
        arch=_listed(options.arch, "--arch"),
        d_sae=parse_whole_numbers(options.d_sae, "--d-sae"),
        k=parse_whole_numbers(options.k, "--k"),
        masked_fraction=parse_numbers(options.masked_fraction, "--masked-fraction"),
        corrupt=_listed(options.corrupt, "--corrupt"),
        penalty=split_list(options.penalty),
        seed=parse_whole_numbers(options.seed, "--seed"),
        lr=parse_numbers(options.lr, "--lr"),
        consistency=parse_numbers(options.consistency, "--consistency"),
        match_strength=options.match_strength,
    )


def split_list(texts: Iterable[str]) -> tuple[str, ...]:
    """`["20,40", "80"]` -> ("20", "40", "80"), each once."""
    return tuple(dict.fromkeys(part.strip() for text in texts for part in text.split(",") if part.strip()))


def parse_numbers(texts: Iterable[str], option: str) -> tuple[float, ...]:
    """A list of numbers. Raises UserError for anything else, and for none."""
    return tuple(_read(part, float, option) for part in _listed(texts, option))


def parse_whole_numbers(texts: Iterable[str], option: str) -> tuple[int, ...]:
    """A list of whole numbers. Raises UserError for anything else, and for none."""
    return tuple(int(_read(part, int, option)) for part in _listed(texts, option))


def _listed(texts: Iterable[str], option: str) -> tuple[str, ...]:
    parts = split_list(texts)
    if not parts:
        raise UserError(f"{option} is empty; give one number, or several with commas between them")
    return parts


def _read(part: str, kind: type[int] | type[float], option: str) -> float:
    try:
        return kind(part)
    except ValueError:
        wanted = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} has '{part}'; give {wanted} with commas between them") from None


def read_hook(cache: ActivationCache, text: str) -> str:
    """The group of a hook point in any spelling, or of the cache's only one. Raises UserError if it is not there."""
    if text:
        return cache.hook(text).name
    names = [hook.name for hook in cache.plan.hooks]
    if len(names) > 1:
        raise UserError(f"{cache.place} holds {', '.join(names)}; choose one with --hook")
    return names[0]


def read_device(text: str) -> str:
    """A device that is there. Raises UserError for another."""
    try:
        torch.zeros(1, device=text).item()  # the device "meta" has no values
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {text} cannot be used here ({reason}); --device cpu always can") from None
    return text


@contextmanager
def before_training() -> Iterator[None]:
    """What is wrong with a cache from the start is input that cannot be used, as any other: exit code 2."""
    try:
        yield
    except (CacheDamaged, CacheIncomplete) as error:
        raise UserError(str(error)) from None
