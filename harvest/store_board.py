"""Where claims hang that processes make on the shards of a cache in an object store."""

from cache_spec.errors import ObjectMissing
from cache_spec.layout import CLAIMS
from cache_spec.store import Store
from harvest.claim_board import CLAIM_NAME, HEAD_BYTES, FolderBoard, Note


class StoreBoard:
    """In a store, where a claim is an object, created once, that grows by a byte when its owner shows that it lives.

    A store has no locks. So a claim also hangs in a folder of the owner's machine, where others on it see at once when
    its owner has died.
    """

    def __init__(self, store: Store, here: FolderBoard) -> None:
        self._store, self._here = store, here
        self._mine: dict[str, bytes] = {}

    def names(self) -> list[str]:
        """As Board says."""
        names = (key.removeprefix(f"{CLAIMS}/") for key in self._store.list(CLAIMS))
        return [name for name in names if CLAIM_NAME.fullmatch(name)]

    def read(self, name: str) -> Note | None:
        """As Board says."""
        try:
            head, n_bytes = self._store.read_start(f"{CLAIMS}/{name}", HEAD_BYTES)
        except ObjectMissing:
            return None
        return Note(head=head, n_bytes=n_bytes)

    def post(self, name: str, line: bytes) -> bool:
        """As Board says."""
        # Here first, so that a process that is killed in between has left no claim whose owner nobody knows to be dead.
        here, created = self._post_here(name, line), False
        try:
            created = self._store.create(f"{CLAIMS}/{name}", line)
        finally:
            if here and not created:
                self._here.remove(name)
        if created:  # the store decides: another process here may have been faster here, and has given way
            self._mine[name] = line
            if not here:
                self._post_here(name, line)
        return created

    def _post_here(self, name: str, line: bytes) -> bool:
        """False if a living process of this machine has posted it. What one left that was killed gives way."""
        if self._here.post(name, line):
            return True
        self._here.remove_abandoned(name)
        return self._here.post(name, line)

    def beat(self, name: str) -> None:
        """As Board says."""
        if name in self._mine:
            self._mine[name] += b"."
            self._store.put(f"{CLAIMS}/{name}", self._mine[name])

    def remove(self, name: str) -> None:
        """As Board says."""
        del self._mine[name]
        self._store.delete(f"{CLAIMS}/{name}")
        self._here.remove(name)

    def is_abandoned(self, name: str) -> bool:
        """As Board says."""
        return name not in self._mine and self._here.is_abandoned(name)

    def clear(self) -> None:
        """Remove all claims: when every shard is committed they mean nothing."""
        for name in self.names():
            self._store.delete(f"{CLAIMS}/{name}")
        self._here.clear()
