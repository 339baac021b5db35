"""Where the ranks of a job meet: a small store of keys and values, and in it the roll of those who are there.

What a store holds may be of an attempt before this one: torchrun keeps it over restarts, and the number that it gives
to an attempt is not the same on all machines. So the first rank opens each meeting under a name that never was, and
whoever it has not called by the word that he made up for himself is not in it.
"""

import json
import os
import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from cache_spec.errors import UserError
from train.watch import Rank, address

JOIN_SECONDS = 120  # for all to come; they start together
_ANSWER_SECONDS = 5  # until a machine that does not answer is asked again
_LEADER = "leader"
_ROLL = "roll"
_POLL_SECONDS = 0.005


def meet(rank: Rank) -> "tuple[dist.PrefixStore, tuple[Rank, ...]]":
    """A store that this job's ranks have for themselves, and all of them in order. Raises UserError if one does not
    come."""
    try:
        return _called(_store(rank), rank)
    except UserError:
        raise
    except (dist.DistError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{rank} found no meeting place at {address()} ({reason}); check that all processes were started and that "
            "this machine reaches that one"
        ) from None


def _store(rank: Rank) -> "dist.PrefixStore":
    """What all processes of the job reach. torchrun keeps it; without torchrun the first rank does."""
    _reach(rank)
    store, _, _ = next(dist.rendezvous("env://", rank.index, rank.count, timeout=timedelta(seconds=JOIN_SECONDS)))
    while isinstance(store, dist.PrefixStore):  # an older torch puts the attempt in, as this machine counts it
        store = store.underlying_store
    return dist.PrefixStore(f"granary/{os.environ.get('TORCHELASTIC_RUN_ID', '')}", store)


def _reach(rank: Rank) -> None:
    """Return when there is somebody at the meeting place, or raise what the system says: torch would add frames of C++
    to it, and try for as long several times over."""
    place, last = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), time.monotonic() + JOIN_SECONDS
    while True:
        try:
            if keeps_store(rank):  # nobody is there before this rank is
                socket.getaddrinfo(*place)
            else:
                socket.create_connection(place, timeout=_ANSWER_SECONDS).close()
            return
        except OSError:
            if time.monotonic() > last:
                raise
        time.sleep(20 * _POLL_SECONDS)


def keeps_store(rank: Rank) -> bool:
    """Whether this process keeps the store of the job, which goes with it."""
    return rank.index == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _called(store: "dist.PrefixStore", rank: Rank) -> "tuple[dist.PrefixStore, tuple[Rank, ...]]":
    """Come, again and again under each new first rank, until one has called all of its ranks and this one is among
    them."""
    word, meeting, last = uuid.uuid4().hex, "", time.monotonic() + JOIN_SECONDS
    if rank.index == 0:
        store.set(_LEADER, word)
    while time.monotonic() < last:
        if not store.check([_LEADER]):
            time.sleep(_POLL_SECONDS)
            continue
        leader = word if rank.index == 0 else store.get(_LEADER).decode()
        inner = dist.PrefixStore(leader, store)
        if leader != meeting:
            meeting = leader
            inner.set(str(rank.index), json.dumps({"word": word, "rank": vars(rank)}))
        if rank.index == 0 and inner.check(keys := _keys(rank)):
            inner.set(_ROLL, json.dumps([json.loads(value) for value in inner.multi_get(keys)]))
        if inner.check([_ROLL]):
            roll = json.loads(inner.get(_ROLL))
            if rank.index < len(roll) and roll[rank.index]["word"] == word:
                return inner, tuple(Rank(**each["rank"]) for each in roll)
        time.sleep(_POLL_SECONDS)
    here = dist.PrefixStore(meeting, store)
    missing = [key for key in _keys(rank) if not here.check([key])] if meeting else ["0"]
    raise UserError(
        f"of {rank.count} ranks {', '.join(missing) or '0'} did not come within {JOIN_SECONDS} s; look for their "
        "errors above, or start all of them again"
    )


def _keys(rank: Rank) -> list[str]:
    """Under which the ranks of a job say that they are there."""
    return [str(index) for index in range(rank.count)]
