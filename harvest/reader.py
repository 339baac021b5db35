"""The cut model: it ends after the last wanted layer, and tells what passes its hook points.

A cut never touches the model it is taken from. Modules on the way to what changes get a twin, which has its own hooks
and children and shares everything else; so no hook stays behind, and a model may have several readers.
"""

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from harvest.architecture import FAMILIES, Family, LoadedModel, hf_name


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Keys and values of one batch, each [batch, n_heads, window, d_head], layer by layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]


class Reader:
    """Reads activations [batch, window, d_model] at its hook points; make one with `open_reader`."""

    def __init__(self, loaded: LoadedModel, hook_points: Sequence[HookPoint], compile: bool) -> None:
        self.hook_points = tuple(hook_points)
        self.device = loaded.device
        self._found: dict[HookPoint, Tensor] = {}
        self._compiled = compile
        self._is_known = loaded.family in FAMILIES
        self._sliding = loaded.model.config.get_text_config().to_dict().get("sliding_window") or math.inf
        whole, twins = cut_model(loaded.model, loaded.places, max(point.layer for point in hook_points))
        for point in self.hook_points:
            self._record(whole, hf_name(loaded, point), point, twins)
        if compile:
            _compile_layers(_own(whole, loaded.places.layers, twins), loaded, self.hook_points)
        self.base = whole.base_model
        self._cache_word = _cache_word(self.base)

    def read(self, tokens: Tensor) -> dict[HookPoint, Tensor]:
        """tokens [batch, window], on any device -> [batch, window, d_model] at each hook point, on the model's.

        These are the bits that a forward hook on the whole model sees. Raises UserError if compiling fails.
        """
        return self._run(tokens, use_cache=False)

    def can_continue(self, window_tokens: int) -> bool:
        """Whether `read_kept` and `read_after` work for windows of this length.

        Not for a compiled model, whose shapes would change all the time; not where attention forgets the beginning of
        a window; and not for a family without a row in FAMILIES, which the tests do not know.
        """
        return self._is_known and not self._compiled and window_tokens <= self._sliding

    def read_kept(self, tokens: Tensor) -> tuple[dict[HookPoint, Tensor], Kept]:
        """As `read`, bit for bit, with the keys and values that `read_after` goes on from."""
        cache = DynamicCache()
        found = self._run(tokens, use_cache=True, **{self._cache_word: cache})
        layers: Any = cache.layers  # DynamicLayer, each with keys and values
        return found, Kept(layers=tuple((layer.keys, layer.values) for layer in layers))

    def read_after(self, kept: Kept, rows: Tensor, start: int, tokens: Tensor) -> dict[HookPoint, Tensor]:
        """The rest of windows that begin like windows of the kept batch; `kept` stays as it is.

        rows: int64 [n], places in the kept batch. tokens: [n, window - start], what follows the same `start` tokens.
        Returns [n, window - start, d_model] at each hook point, equal to `read` of the whole windows up to rounding.
        """
        rows = rows.to(self.device)
        begun = [(keys[rows, :, :start], values[rows, :, :start]) for keys, values in kept.layers]
        return self._run(tokens, use_cache=True, **{self._cache_word: DynamicCache(begun)})

    def _run(self, tokens: Tensor, **options: Any) -> dict[HookPoint, Tensor]:
        self._found.clear()
        try:
            with torch.no_grad():
                self.base(input_ids=tokens.to(self.device), **options)
        # Looked up after an error only: importing it takes seconds.
        except torch._dynamo.exc.BackendCompilerFailed as error:  # pyright: ignore[reportAttributeAccessIssue]
            reason = str(error.inner_exception).strip().split("\n")[0]
            raise UserError(
                f"torch.compile failed ({reason}); it needs a C++ compiler, and on a GPU Triton: install what is "
                "missing, or leave --compile out"
            ) from error
        found = {point: self._found[point] for point in self.hook_points}
        self._found.clear()  # or the activations would live until the next batch
        return found

    def _record(self, whole: nn.Module, path: str, point: HookPoint, twins: set[int]) -> None:
        found = self._found

        def keep(activation: Tensor) -> None:
            found[point] = activation

        add_hook(partial(_own, whole, twins=twins), path, keep)


@contextlib.contextmanager
def open_reader(loaded: LoadedModel, hook_points: Sequence[HookPoint], *, compile: bool = False) -> Iterator[Reader]:
    """The model cut after the last of the hook points, to be read as often as wanted.

    `compile` runs each layer through torch.compile with static shapes. That takes a minute or so at the first batch,
    and again at every batch of another shape, and needs a C++ compiler (on a GPU, Triton); layers of one kind are
    compiled once. Activations change by rounding.

    Raises UserError for a layer or a site that the model does not have.
    """
    for point in hook_points:
        hf_name(loaded, point)
    yield Reader(loaded, hook_points, compile)


def release_rest(loaded: LoadedModel, hook_points: Sequence[HookPoint]) -> LoadedModel:
    """Drop what comes after the last wanted layer, and the head, for good; what is left goes to the model's device.

    The given model loses them too: this is how their memory is freed before the rest needs any on the GPU.
    """
    for point in hook_points:
        hf_name(loaded, point)
    model, last = loaded.model, max(point.layer for point in hook_points)
    for name, child in model.named_children():
        if child is not model.base_model:
            model._modules[name] = nn.Identity()
    _end(model.get_submodule, loaded.places, last)
    move(model, loaded.device, loaded.name)
    return replace(loaded, is_whole=False)


def move(model: PreTrainedModel, device: torch.device, name: str) -> None:
    """Put a model's weights on a device. Raises UserError if they do not fit."""
    try:
        model.to(device)  # pyright: ignore[reportArgumentType]
    except torch.OutOfMemoryError as error:
        n_bytes = sum(weight.nbytes for weight in model.parameters())
        raise UserError(
            f"the {n_bytes / 2**30:.1f} GiB of weights of {name} do not fit on {device}; free memory there, choose "
            "another --device, or halve them with --dtype bfloat16"
        ) from error


def cut_model(model: PreTrainedModel, places: Family, last: int) -> tuple[PreTrainedModel, set[int]]:
    """(a twin that ends after the layer `last`, the ids of those of its modules that may be changed).

    Its base model's last hidden state is that layer's output, without the norm. The given model stays as it is.
    """
    whole, twins = _twin(model), set()
    _end(partial(_own, whole, twins=twins), places, last)
    return whole, twins


def _end(find: Callable[[str], nn.Module], places: Family, last: int) -> None:
    """Take away what comes after a layer; `find` gives modules that may be changed."""
    layers = find(places.layers)
    assert isinstance(layers, nn.ModuleList)
    del layers[last + 1 :]
    if places.norm:
        parent, _, norm = places.norm.rpartition(".")
        find(parent)._modules[norm] = nn.Identity()


def add_hook(
    find: Callable[[str], nn.Module], path: str, see: Callable[[Tensor], Tensor | None]
) -> torch.utils.hooks.RemovableHandle:
    """Let `see` have what passes a hook point; what it returns, if anything, takes its place. `path` is a `hf_name`."""

    def on_output(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        if isinstance(output, tuple):  # attention returns its weights too
            new = see(output[0])
            return None if new is None else (new, *output[1:])
        return see(output)

    def on_input(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        new = see(inputs[0] if inputs else named["hidden_states"])
        if new is None:
            return None
        return ((new, *inputs[1:]), named) if inputs else (inputs, {**named, "hidden_states": new})

    if path.endswith(".input"):
        return find(path.removesuffix(".input")).register_forward_pre_hook(on_input, with_kwargs=True)
    return find(path).register_forward_hook(on_output)


def _twin(module: Any) -> Any:
    """The same module with children and hooks of its own; weights and everything else are shared."""
    twin = copy.copy(module)
    twin.__dict__.update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    return twin


def _own(whole: nn.Module, path: str, twins: set[int]) -> nn.Module:
    """The module at the path, where it and all that hold it may be changed: twins replace those that are shared."""
    module = whole
    for name in filter(None, path.split(".")):
        child = module._modules[name]
        assert child is not None
        if id(child) not in twins:
            child = module._modules[name] = _twin(child)
            twins.add(id(child))
        module = child
    return module


def _compile_layers(layers: nn.Module, loaded: LoadedModel, hook_points: Sequence[HookPoint]) -> None:
    """Compile layer by layer: layers of one kind share their code, and hooks on a layer stay outside of it.

    torch.compile would take no notice of hooks inside a layer it has already compiled for another one, so in a layer
    with such hooks its parts are compiled and the layer itself is not.
    """
    inside = {point.layer for point in hook_points if point.site in ("attn_out", "mlp_out")}
    for i, layer in enumerate(layers.children()):
        twin = layers._modules[str(i)] = _twin(layer)
        if i not in inside:
            twin.forward = torch.compile(twin.forward, dynamic=False)
            continue
        for name, part in layer.named_children():
            child = twin._modules[name] = _twin(part)
            child.forward = torch.compile(child.forward, dynamic=False)


def _cache_word(base: nn.Module) -> str:
    """What this model and this release of transformers call the keys and values that are kept."""
    return "cache" if "cache" in inspect.signature(type(base).forward).parameters else "past_key_values"
