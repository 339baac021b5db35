"""The shards that a process makes, one after another: its own, then those that others leave undone."""

import time
from collections.abc import Callable, Iterable, Iterator

from cache_spec.plan import Plan
from harvest.claims import Claim, Claims
from harvest.share import Share

_POLL_S = 1.0  # between two looks of a process that waits
_NAMED = 3  # owners that are named when a process waits for them


class Turns:
    """Hands out shards, each claimed when its turn comes.

    `done` are those known to be committed, and `is_done` looks whether one is by now. Each is asked for once a turn at
    most: there may be thousands of shards, and dozens of processes that ask.
    """

    def __init__(
        self, plan: Plan, share: Share, claims: Claims, done: Iterable[int], is_done: Callable[[int], bool]
    ) -> None:
        self._plan, self._share, self._claims, self._is_done = plan, share, claims, is_done
        self._done = set(done)
        own = [shard for shard in range(plan.n_shards) if share.owns(shard)]
        # Others' shards from the end: their owners begin at the front.
        rest = [shard for shard in reversed(range(plan.n_shards)) if not share.owns(shard)]
        self._order, self._n_own = [*own, *rest], len(own)
        self._dead: set[tuple[int, int]] = set()  # shares whose processes have died
        self._taken: set[int] = set()

    def next(self) -> int | None:
        """A shard that is now this process' to make; None if there is none at this moment."""
        self._claims.look(read=False)
        for shard in self._free():
            if not self._claims.take(shard):
                continue
            if self._is_done(shard):  # committed since the look, and its claim taken back
                self._done.add(shard)
                self._claims.give_back(shard)
                continue
            self._taken.add(shard)
            return shard
        return None

    def wait(self, say: Callable[[str], None], poll: float = _POLL_S) -> bool:
        """Return when there is a shard for `next`, True, or when there will be none, False.

        Shards that others are making are waited for, as they may die. In a share cut by hand no longer than it takes
        to see that they live.
        """
        said = False
        while True:
            self._claims.look(read=True)
            self._note_dead()
            if next(self._free(), None) is not None:
                return True
            others = self._claims.others()
            at_work = {shard: others[shard] for shard in self._missing() if shard in others}
            if not self._share.helps:
                at_work = self._unsure()
            if not at_work:
                return False
            if not said:
                say(_waiting(at_work))
                said = True
            time.sleep(poll)

    def left(self) -> list[int]:
        """The missing shards that this process cares for, its own first."""
        return list(self._missing())

    def n_rows_ahead(self) -> int:
        """Rows of the shards that it has made and, as far as it knows, will make."""
        others = self._claims.others()
        own = {shard for shard in self._order[: self._n_own] if shard not in self._done and shard not in others}
        return sum(map(self._plan.rows_in, own | self._taken))

    def _missing(self) -> Iterator[int]:
        for shard in self._order:
            if shard not in self._done and self._may_make(shard):
                if self._is_done(shard):
                    self._done.add(shard)
                else:
                    yield shard

    def _free(self) -> Iterator[int]:
        """The missing shards that nobody makes, as of the last look."""
        others, mine = self._claims.others(), set(self._claims.held())
        free = (shard for shard in self._missing() if shard not in mine)
        return (shard for shard in free if shard not in others or self._claims.is_dead(others[shard]))

    def _may_make(self, shard: int) -> bool:
        if self._share.helps or self._share.owns(shard):
            return True
        return any(shard % count == index for index, count in self._dead)

    def _note_dead(self) -> None:
        shares = [claim.share for claim in self._claims.others().values() if self._claims.is_dead(claim)]
        self._dead |= {(share.index, share.count) for share in shares if share is not None and share.count > 1}

    def _unsure(self) -> dict[int, Claim]:
        """The claims on missing shards whose owners may live or not."""
        return {
            shard: claim
            for shard, claim in self._claims.others().items()
            if not claim.has_changed and not self._claims.is_dead(claim) and not self._is_done(shard)
        }


def _waiting(at_work: dict[int, Claim]) -> str:
    shards = list(at_work)
    names = ", ".join(f"{shard} ({at_work[shard].owner})" for shard in shards[:_NAMED])
    more = f" and {len(shards) - _NAMED:,} more" if len(shards) > _NAMED else ""
    noun = "shard" if len(shards) == 1 else "shards"
    return f"waiting for {noun} {names}{more}, which others are making; what they leave undone is made here"
