"""Which shards this process makes, and on which GPU, when several processes make one cache.

Processes never talk to each other: each begins with every n-th shard, and the disk says what is done and who is at it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cache_spec.errors import UserError

_TORCHRUN = ("RANK", "WORLD_SIZE")
_ALL = "--shard 0/1 makes every shard here"
_BY_HAND = "--shard"  # the source of a share that a person has cut
CLAIM = "claim"  # --shard claim: no share at all, whatever the launcher says


@dataclass(frozen=True, kw_only=True)
class Share:
    """Every `count`-th shard, from `index` on; `source` says who decided that, and is empty for a process alone."""

    index: int = 0
    count: int = 1
    source: str = ""

    def owns(self, shard: int) -> bool:
        """Whether this process makes the shard."""
        return shard % self.count == self.index

    @property
    def helps(self) -> bool:
        """Whether a process that is done with its share goes on with any shard that nobody is at.

        A person who cuts shares may start the others later, or elsewhere, so there only the shards of processes that
        died are taken over.
        """
        return self.source != _BY_HAND


def read_share(text: str, environ: Mapping[str, str]) -> Share:
    """The share that `--shard i/n` names; without it, what torchrun or Slurm say of this process; else all.
    `--shard claim` is all of them too, one after another as they are free.

    A Slurm array multiplies with the tasks of each of its jobs. Raises UserError for a share that cannot be read.
    """
    if text.strip() == CLAIM:
        return Share(source=f"--shard {CLAIM}")
    if text:
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
        if match is None or int(match[1]) >= int(match[2]):
            raise UserError(
                f"--shard is {text!r}; give i/n with i from 0 to n - 1, such as 0/4, 1/4, 2/4 and 3/4, or {CLAIM}"
            )
        return Share(index=int(match[1]), count=int(match[2]), source=_BY_HAND)
    job, task = _read_array(environ), _read_task(environ)
    sources = [share.source for share in (job, task) if share.count > 1]
    return Share(index=job.index * task.count + task.index, count=job.count * task.count, source=" and ".join(sources))


def local_device(device: str, environ: Mapping[str, str]) -> str:
    """`cuda` becomes the GPU of this process, such as cuda:2, if torchrun or srun started several on this machine.

    With one GPU in CUDA_VISIBLE_DEVICES that one is this process' own (`srun --gpus-per-task=1`).
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    local = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if environ.get(name)), None)
    if device != "cuda" or local is None or (len(visible) == 1 and visible[0]):
        return device
    return f"cuda:{_number(environ, local)}"


def _read_task(environ: Mapping[str, str]) -> Share:
    given = [name for name in _TORCHRUN if environ.get(name)]
    if len(given) == 1:
        raise UserError(
            f"of {' and '.join(_TORCHRUN)} only {given[0]} is set; set both or none, or give --shard ({_ALL})"
        )
    names = _TORCHRUN if given else _slurm_names(environ)
    if not names:
        return Share()
    index, count = (_number(environ, name) for name in names)
    if index >= count:
        raise UserError(f"{names[0]} is {index} and {names[1]} is {count}; give --shard instead ({_ALL})")
    return Share(index=index, count=count, source=" and ".join(names))


def _slurm_names(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The two variables of a task that srun started. A batch script that does not use srun is alone, and yet has
    both, with the number of tasks it could start; only a step has an id."""
    count_name = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    in_batch_script = bool(environ.get("SLURM_JOB_ID")) and not environ.get("SLURM_STEP_ID")
    names = ("SLURM_PROCID", count_name)
    return names if all(map(environ.get, names)) and not in_batch_script else ()


def _read_array(environ: Mapping[str, str]) -> Share:
    if not environ.get("SLURM_ARRAY_TASK_ID"):
        return Share()
    number, first, count = (_number(environ, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "COUNT"))
    step = _number(environ, "SLURM_ARRAY_TASK_STEP") if environ.get("SLURM_ARRAY_TASK_STEP") else 1
    index, left = divmod(number - first, max(step, 1))
    last = _number(environ, "SLURM_ARRAY_TASK_MAX") if environ.get("SLURM_ARRAY_TASK_MAX") else None
    even = last is None or last == first + step * (count - 1)
    if left or not even or not 0 <= index < count:
        raise UserError(
            f"the {count} numbers of this Slurm array, from {first}, are not evenly spaced; use an array such as "
            f"0-{max(count, 1) - 1}, or give --shard ({_ALL})"
        )
    return Share(index=index, count=count, source="SLURM_ARRAY_TASK_ID")


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise UserError(
            f"{name} is {text!r} in the environment, which is no number; unset it, or give --shard ({_ALL})"
        )
    return int(text)
