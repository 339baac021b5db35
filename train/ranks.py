"""The processes of one training job: who this one is, what all of them agree on, and how the job ends.

torchrun starts them and says who each is by environment variables. They meet in a small store of keys and values (a
torch.distributed.Store), in which they also watch each other (train/watch.py). Facts travel as JSON, never as pickles.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cache_spec.errors import UserError
from train.meeting import keeps_store, meet
from train.parallel.axis import ALONE, Axis, Spread
from train.watch import INTERRUPTED, JobEnded, Rank, Watch, interrupted_once

PARALLEL = ("sweep", "data", "latents")
COLLECTIVE_SECONDS = 600  # for one exchange: the first rank may write a checkpoint meanwhile; the watch is faster
_SAME_ERROR_SECONDS = 3.0
_POLL_SECONDS = 0.005


def read_rank(environ: Mapping[str, str]) -> Rank:
    """Who torchrun says that this process is; one that it did not start is alone.

    Raises UserError for variables that are set by halves or hold no numbers.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if environ.get(name)]
    if not given:
        return Rank(host=socket.gethostname(), pid=os.getpid())
    if len(given) == 1:
        raise UserError(f"of RANK and WORLD_SIZE only {given[0]} is set; start with torchrun, or unset it")
    index, count = (_number(environ, name) for name in ("RANK", "WORLD_SIZE"))
    local_index, local_count = (
        _number(environ, name) if environ.get(name) else default
        for name, default in (("LOCAL_RANK", index), ("LOCAL_WORLD_SIZE", count))
    )
    if not (index < count and local_index < local_count and 0 <= index - local_index <= count - local_count):
        raise UserError(
            f"RANK {index} of WORLD_SIZE {count} (on this machine {local_index} of {local_count}) cannot be"
        )
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if count > 1 and not environ.get(name)]:
        raise UserError(f"{' and '.join(missing)} not set, so {count} processes cannot meet; start them with torchrun")
    if count > 1 and _number(environ, "MASTER_PORT") > 65_535:
        raise UserError(f"MASTER_PORT {environ['MASTER_PORT']} is above 65535; give the port that torchrun meets at")
    return Rank(
        index=index,
        count=count,
        local_index=local_index,
        local_count=local_count,
        host=socket.gethostname(),
        pid=os.getpid(),
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name} is {text!r} in the environment, which is no number; start with torchrun, or unset it")
    return int(text)


def read_parallel(text: str, rank: Rank) -> str:
    """What several processes share of the work, "" for one process. Raises UserError for an unknown choice."""
    if text and text not in PARALLEL:
        raise UserError(f"--parallel {text} is unknown; it is one of {', '.join(PARALLEL)}")
    return (text or PARALLEL[0]) if rank.count > 1 else ""


def local_device(device: str, rank: Rank) -> str:
    """`cuda` becomes the GPU of this process, such as cuda:2; any other device is taken at its word.

    Raises UserError if this machine has fewer GPUs than processes.
    """
    if device != "cuda" or rank.count == 1 or not torch.cuda.is_available():
        return device
    n_devices = torch.cuda.device_count()
    if rank.local_index >= n_devices:
        raise UserError(
            f"{rank.local_count} processes on {rank.host} and {n_devices} "
            f"{'GPU' if n_devices == 1 else 'GPUs'}: give torchrun --nproc-per-node={n_devices}, or name the device "
            "that all of them use, such as --device cuda:0"
        )
    return f"cuda:{rank.local_index}"


@dataclass(kw_only=True, eq=False)
class Team:
    """The ranks of a job as one of them sees it. A process that trains alone is a team of one."""

    rank: Rank
    members: tuple[Rank, ...]
    device: str = "cpu"
    parallel: str = ""
    """One of PARALLEL; empty for one process."""
    group: "dist.ProcessGroup | None" = None
    """For collectives on tensors, on the CPU and on the device; None where ranks need none."""
    store: "dist.PrefixStore | None" = None
    watch: Watch | None = None
    _n_gathered: dict[str, int] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks."""
        return self.rank.index == 0

    @property
    def spread(self) -> Spread:
        """How each run is spread over the ranks; not at all where they share a sweep."""
        axis = Axis(self.rank.count, self.rank.index, self.group)
        if self.parallel == "data":
            return Spread(rows=axis, all=axis)
        return Spread(latents=axis, all=axis) if self.parallel == "latents" else ALONE

    @property
    def node(self) -> tuple[Rank, ...]:
        """The ranks on this machine: those that torchrun started together."""
        return _node(self.rank, self.members)

    def gather(self, facts: Any, among: Sequence[Rank] | None = None) -> list[Any]:
        """What each rank gives, as JSON has it, in the order of the ranks. All ranks (or all of `among`) call it."""
        among = self.members if among is None else among
        if self.store is None:
            return [json.loads(json.dumps(facts))]
        name = f"gather/{among[0].index}-{among[-1].index}"
        n = self._n_gathered[name] = self._n_gathered.get(name, 0) + 1
        keys = [f"{name}/{n}/{rank.index}" for rank in among]
        self.store.set(f"{name}/{n}/{self.rank.index}", json.dumps(facts))
        while not self.store.check(keys):
            time.sleep(_POLL_SECONDS)
            if self.watch is not None:
                self.watch.check()
        return [json.loads(value) for value in self.store.multi_get(keys)]

    def on_loss(self, advice: Callable[[], str]) -> None:
        """What to say, and to do, when a rank is gone; asked for when it has happened."""
        if self.watch is not None:
            self.watch.advice = advice

    def has_lost(self) -> bool:
        """Whether a rank is known to be gone."""
        return self.watch is not None and self.watch.reason is not None

    def part_of(self, free: int | None) -> int | None:
        """Of the free bytes of this rank's device, those that are for it: several may share a CPU, or a GPU."""
        ours = json.dumps([self.rank.host, self.device])
        n_sharing = [json.dumps(each) for each in self.gather([self.rank.host, self.device])].count(ours)
        return None if free is None else free // n_sharing

    def agree(self, facts: Any, among: Sequence[Rank] | None = None) -> Any:
        """What the first rank (of `among`) says."""
        return self.gather(facts, among)[0]


def alone() -> Team:
    """The team of a process that trains by itself."""
    rank = Rank(host=socket.gethostname(), pid=os.getpid())
    return Team(rank=rank, members=(rank,))


@contextmanager
def joined(rank: Rank, *, parallel: str, device: str) -> Iterator[Team]:
    """The team of this process's job, for as long as it works. A process alone is a team of one, without ado.
    `parallel` as for `read_parallel`; what is wrong with it, or with anything that comes later, is spoken once.

    With several, only the first rank speaks: the others log warnings under their names, and an error that another has
    is spoken once. A rank that dies ends the job on all ranks, which then raise UserError with its name.
    """
    if rank.count == 1:
        yield Team(rank=rank, members=(rank,), device=device, parallel=read_parallel(parallel, rank))
        return
    with interrupted_once() as interrupted:
        if rank.index:
            _speak_by_name(rank)
        store, members = meet(rank)
        keeps = (parallel or PARALLEL[0]) == PARALLEL[0]
        with (
            Watch(store.clone(), rank, members, interrupted=interrupted, keeps=keeps) as watch,
            _ended_together(rank, watch),
        ):
            _check_nodes(members)
            parallel, device = read_parallel(parallel, rank), local_device(device, rank)
            team = Team(rank=rank, members=members, device=device, parallel=parallel, store=store, watch=watch)
            try:
                if parallel != "sweep":  # a sweep's ranks exchange no tensors
                    team.group = _process_group(store, rank, device)
                yield team
            finally:
                if team.group is not None and watch.reason is None:
                    dist.destroy_process_group()


def _speak_by_name(rank: Rank) -> None:
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in root.handlers:
        handler.setFormatter(logging.Formatter(f"{rank}: %(message)s"))


def _check_nodes(members: Sequence[Rank]) -> None:
    """Raises UserError if ranks that share memory, by their numbers, are not on one machine, by its name."""
    for rank in members:
        for place, other in enumerate(_node(rank, members)):
            if (other.host, other.local_index, other.local_count) != (rank.host, place, rank.local_count):
                raise UserError(
                    f"{rank} and {other} are not number {rank.local_index} and {place} of the {rank.local_count} ranks "
                    "of one machine; set LOCAL_RANK and LOCAL_WORLD_SIZE for each, and number the ranks of a machine "
                    "in a row, or start with torchrun"
                )


def _node(rank: Rank, members: Sequence[Rank]) -> tuple[Rank, ...]:
    first = rank.index - rank.local_index
    return tuple(members[first : first + rank.local_count])


def _process_group(store: "dist.PrefixStore", rank: Rank, device: str) -> "dist.ProcessGroup":
    """gloo for tensors on the CPU, and nccl beside it for those on a GPU."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank.index,
        world_size=rank.count,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    assert dist.group.WORLD is not None
    return dist.group.WORLD


@contextmanager
def _ended_together(rank: Rank, watch: Watch) -> Iterator[None]:
    """Tell the others how this rank ended, and turn what ended it into what this rank has to say."""
    try:
        yield
        watch.tell("")
    except KeyboardInterrupt:
        if not watch.look():
            watch.tell(INTERRUPTED)
            if rank.index == 0:
                raise
            raise SystemExit(JobEnded.exit_code) from None
        raise _job_ended(watch) from None
    except JobEnded:
        raise _job_ended(watch) from None
    except UserError as error:
        watch.tell(f"stopped: {error}")
        raise _own(error, rank, watch) from None
    except RuntimeError:  # a collective's, if another rank has left
        if not watch.wait_for_reason():
            raise
        raise _job_ended(watch) from None
    finally:
        watch.tell("failed with the traceback that it printed")  # unless it has told
        if keeps_store(rank):
            watch.wait_for_others()
        else:
            watch.leave()


def _job_ended(watch: Watch) -> BaseException:
    watch.tell("ended with the others")
    return JobEnded(watch.sentence) if watch.speaks else SystemExit(JobEnded.exit_code)


def _own(error: UserError, rank: Rank, watch: Watch) -> BaseException:
    """An error of this rank: the first speaks, another only if the first does not say the same."""
    if rank.index == 0:
        return error
    last = time.monotonic() + _SAME_ERROR_SECONDS
    # RuntimeError: the store is gone, with whatever the first rank said. KeyboardInterrupt: the launcher stops the
    # ranks that are left, and this one's own error is why.
    with suppress(RuntimeError, KeyboardInterrupt):
        while time.monotonic() < last:
            if watch.told().get(0, {}).get("how") == f"stopped: {error}":
                return SystemExit(error.exit_code)
            time.sleep(10 * _POLL_SECONDS)
    named = UserError(f"{rank} stopped: {error}")
    named.exit_code = error.exit_code
    return named
