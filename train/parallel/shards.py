"""The tensors of an SAE whose latents are spread, as one: which part is here, and how they become a file and come back.

A file holds whole tensors, so it says nothing of how many processes there were. No process ever holds more of one than
a block beside its own part.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from cache_spec.files import Partial, crc32c, disk_full_as_error, sync_folder
from train.parallel.axis import Axis

BLOCK_BYTES = 64 << 20
_WHOLE = ("b_dec", "W_skip", "step")  # what every process has all of: parameters, and Adam's count of steps
_TYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.bool: "BOOL"}


def sharded_dim(name: str, n_dims: int) -> int | None:
    """The dimension of latents in a tensor of a run's state or of a finished SAE; None if each process has all of it.

    Names are those of TrainRun.state: sae.W_enc, adam.W_enc.exp_avg, silent_tokens, lp.queue, kernel.density.
    """
    parts = name.split(".")
    if n_dims == 0 or parts[0] in ("lp", "kernel") or any(part in _WHOLE for part in parts):
        return None
    return 1 if "W_enc" in parts else 0


def as_one(tensors: Mapping[str, Tensor], axis: Axis) -> dict[str, DTensor]:
    """The parts of each process as tensors that know their whole shape and where its parts are."""
    meshes: dict[str, DeviceMesh] = {}
    made = {}
    for name, tensor in tensors.items():
        kind = tensor.device.type
        if kind not in meshes:
            meshes[kind] = DeviceMesh.from_group(axis.group, kind)
        dim = sharded_dim(name, tensor.dim())
        placement = Replicate() if dim is None else Shard(dim)
        made[name] = DTensor.from_local(tensor.detach(), meshes[kind], [placement], run_check=False)
    return made


def write_tensors(path: Path, tensors: Mapping[str, Tensor], axis: Axis, advice: str) -> tuple[int, str]:
    """Write whole tensors as a safetensors file: the first process writes, the others send it their parts.

    Gives the file's size and checksum on the first, and nothing of worth on the others. Raises DiskFull, which ends
    with the advice.
    """
    whole = as_one(tensors, axis)
    names = sorted(whole, key=lambda name: (list(_TYPES).index(whole[name].dtype), name))
    if axis.index:
        for name in names:
            for _ in _blocks(whole[name], axis):
                pass
        return 0, ""
    header = _header([(name, whole[name]) for name in names])
    n_bytes = len(header) + sum(whole[name].numel() * whole[name].element_size() for name in names)
    checksum = crc32c(header)
    with disk_full_as_error(path, n_bytes, advice), Partial(path) as partial:
        partial.write(header)
        for name in names:
            for block in _blocks(whole[name], axis):
                data = block.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                checksum = crc32c(data, checksum)
                partial.write(data)
        partial.sync()
        partial.replace()
        sync_folder(path.parent)
    return n_bytes, f"{checksum:08x}"


def read_share(path: Path, axis: Axis) -> dict[str, Tensor]:
    """This process's part of the tensors of a file, and all of those that every process has."""
    tensors = {}
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            piece = file.get_slice(name)
            shape = piece.get_shape()
            dim = sharded_dim(name, len(shape))
            if dim is None:
                tensors[name] = file.get_tensor(name)
            else:
                own = axis.share(shape[dim])
                tensors[name] = (piece[:, own] if dim else piece[own]).clone()
    return tensors


def _header(tensors: list[tuple[str, DTensor]]) -> bytes:
    facts: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.element_size()
        facts[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(facts, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: DTensor, axis: Axis) -> Iterator[Tensor]:
    """A whole tensor in blocks, in the order of a file, on the first process; on the others empty ones."""
    local, placement = tensor.to_local(), tensor.placements[0]
    if not isinstance(placement, Shard):
        yield local
        return
    rows = max(1, BLOCK_BYTES // max(1, local[:1].numel() * local.element_size() * (axis.size if placement.dim else 1)))
    if placement.dim == 1:
        for block in local.split(rows):
            yield _side_by_side(block.contiguous(), axis)
        return
    for owner in range(axis.size):
        for block in local.split(rows):
            yield _sent(block.contiguous(), owner, axis)


def _side_by_side(block: Tensor, axis: Axis) -> Tensor:
    """[rows, columns] of each process -> [rows, columns of all]."""
    parts = [torch.empty_like(block) for _ in range(axis.size)] if axis.index == 0 else None
    dist.gather(block, parts, group=axis.group, group_dst=0)
    return torch.cat(parts, dim=1) if parts else block[:0]


def _sent(block: Tensor, owner: int, axis: Axis) -> Tensor:
    if owner == 0:
        return block
    if axis.index == 0:
        received = torch.empty_like(block)
        dist.recv(received, group=axis.group, group_src=owner)
        return received
    if axis.index == owner:
        dist.send(block, group=axis.group, group_dst=0)
    return block[:0]
