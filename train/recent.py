"""A store of the latest values, for any number of threads."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Kept = TypeVar("Kept")


class _Place(Generic[Kept]):
    """Where a value goes; the lock is held by whoever makes it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: list[Kept] = []  # one, when it is made


class Recent(Generic[Key, Kept]):
    """Keeps `n_kept` values. A value is made once, by the first who asks; others wait for it and for no other."""

    def __init__(self, n_kept: int) -> None:
        self._n_kept = n_kept
        self._lock = threading.Lock()
        self._places: OrderedDict[Key, _Place[Kept]] = OrderedDict()

    def get(self, key: Key, make: Callable[[Key], Kept]) -> Kept:
        """The value of a key; the least recently used one makes room for it. Raises what `make` raises."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                place = self._places[key] = _Place()
                if len(self._places) > self._n_kept:
                    self._places.popitem(last=False)
            else:
                self._places.move_to_end(key)
        if not place.values:
            with place.lock:
                if not place.values:
                    place.values.append(make(key))
        return place.values[0]

    def drop(self, key: Key) -> None:
        """Forget the value of a key, if there is one; whoever has it keeps it."""
        with self._lock:
            self._places.pop(key, None)

    def drop_oldest(self) -> bool:
        """The same for the least recently used one; says whether there was one."""
        with self._lock:
            made = [key for key, place in self._places.items() if place.values]
            if made:
                del self._places[made[0]]
            return bool(made)

    def keys(self, *, made: bool = True) -> list[Key]:
        """Of the values that are there; else also of those that somebody is making, or could not make."""
        with self._lock:
            return [key for key, place in self._places.items() if place.values or not made]

    def __iter__(self) -> Iterator[Kept]:
        with self._lock:
            return iter([value for place in self._places.values() for value in place.values])
