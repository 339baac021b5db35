"""Object stores: read, list and put whole objects below a URL, and a store's refusals as one sentence each.

Only this module knows obstore, which is imported when a URL is used: a cache in a folder needs none. Credentials and
the address of a store of one's own come from the environment alone (docs/stores.md); none of them passes through here
or into a message. A `Store` may be shared by threads, never with a forked process: open it where it is used.
"""

import errno
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from cache_spec.errors import CacheDamaged, ObjectMissing, StoreError, UserError
from cache_spec.store_url import SETTINGS, check_settings, check_url, is_plain
from cache_spec.untrusted import MOST_BYTES

_PART_BYTES, _MOST_PARTS, _PARTS_AT_ONCE = 8 * 2**20, 9000, 4
_METADATA_HOSTS = ("169.254.169.254", "metadata.google.internal")  # where a machine of the cloud asks who it is
_FINAL = (errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.EDQUOT)
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")  # S3, Azure, Google
_NOT_OPENED = {  # what obstore says before it has asked anybody, and what it means
    "Account must be specified": "the environment's AZURE_STORAGE_ACCOUNT_NAME is not set",
    "Invalid Access Key": "the environment's AZURE_STORAGE_ACCOUNT_KEY is no key",
    "Unable to open service account file": "the file that the environment's GOOGLE_SERVICE_ACCOUNT names is not there",
    "Unable to decode service account file": "the file that the environment's GOOGLE_SERVICE_ACCOUNT names is no key",
}
_MOST_KEYS = 2**22  # of one listing; a cache of 5 TB has fifty thousand
_AGAIN = "run the same command again, it goes on from what has arrived"
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often a request is made again, and how long it is waited for."""

    n_tries: int = 6
    first_wait: float = 0.2  # seconds before the second try; doubles, with a little chance so that many do not march
    longest_wait: float = 10.0
    stall_seconds: float = 60.0  # without a byte
    request_seconds: float = 300.0  # for one request in all, however slowly its bytes come


def open_store(url: str, patience: Patience = Patience()) -> "Store":
    """The store at s3://bucket/key, gs://bucket/key, az://container/key or file:///folder. Nothing is asked of it yet.

    Raises UserError for a URL that is none of these, StoreError if the environment's settings cannot be used.
    """
    url = check_url(url)
    check_settings(url, os.environ)
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise UserError(f"{url} needs the package obstore, which is not installed; `pip install obstore`") from error
    if url.startswith("file:"):
        return Store(url, None, None, patience)
    address: Any = url  # its overloads want the scheme as a type
    client: Any = {
        "timeout": timedelta(seconds=patience.request_seconds),
        "read_timeout": timedelta(seconds=patience.stall_seconds),
        "connect_timeout": timedelta(seconds=min(10.0, patience.stall_seconds)),
    }
    if is_plain(url, os.environ):
        client["allow_http"] = True
    backoff = {
        "init_backoff": timedelta(seconds=patience.first_wait),
        "max_backoff": timedelta(seconds=patience.longest_wait),
    }
    never: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=patience.request_seconds)}
    often: Any = {**never, "max_retries": patience.n_tries - 1, "backoff": backoff}
    try:
        once, patient = (from_url(address, client_options=client, retry_config=retry) for retry in (never, often))
    except (BaseError, ValueError) as error:
        why = next((meant for said, meant in _NOT_OPENED.items() if said in str(error)), _reason(error))
        raise StoreError(f"{url} cannot be opened: {why}; {_look(url)}") from error
    return Store(url, once, patient, patience)


class Store:
    """The objects below a URL, by keys such as `layer_12/clean/c/0/0`. Requests that fail are made again, for a while.

    Raises ObjectMissing for a key that is not there, StoreError for a refusal or when the patience is at its end. A
    store may be a stranger's: no more of an object is ever held than was asked for.
    """

    def __init__(self, url: str, once: Any, often: Any, patience: Patience) -> None:
        """`once` and `often` ask so many times; None: a folder, looked for when something is asked of it."""
        self.url = url
        self._once, self._often, self._patience = once, often, patience

    def read(self, key: str, most: int = MOST_BYTES) -> bytes:
        """The whole object. Raises CacheDamaged, before its bytes come, if they are more than `most`."""
        import obstore

        def get() -> bytes:
            found = obstore.get(self._once, key)
            if (size := found.meta["size"]) > most:
                raise CacheDamaged(
                    f"{self.url}/{key} has {size:,} bytes, and {most:,} are the most that are read of it"
                )
            return _body(found, size)

        return self._ask(key, get)

    def read_start(self, key: str, most: int) -> tuple[bytes, int]:
        """The first bytes of an object, at most so many, and how many it has in all."""
        import obstore

        def get() -> tuple[bytes, int]:
            found = obstore.get(self._once, key)
            n_bytes = min(most, size := found.meta["size"])
            start = bytes(next(iter(found.stream(min_chunk_size=n_bytes + 1)), b""))
            return _whole(start[:n_bytes], n_bytes), size

        return self._ask(key, get)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, all of which must be there."""
        import obstore

        if not length:
            return b""
        part: Any = {"range": (start, start + length)}

        def get() -> bytes:
            if self.url.startswith("file:"):  # a disk gives no more than it is asked for, and is slow in small pieces
                return _whole(bytes(obstore.get_range(self._once, key, start=start, length=length)), length)
            return _body(obstore.get(self._once, key, options=part), length)

        return self._ask(key, get)

    def size(self, key: str) -> int | None:
        """Bytes of the object; None if it is not there."""
        import obstore

        try:
            return self._ask(key, lambda: obstore.head(self._once, key)["size"])
        except ObjectMissing:
            return None

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object, in one step."""
        import obstore

        self._ask(key, lambda: obstore.put(self._once, key, data, use_multipart=False), writing=True)

    def put_file(self, key: str, path: Path) -> None:
        """Write or replace an object with a file's content, in parts if it is large; it appears whole or not at all."""
        import obstore

        n_bytes = path.stat().st_size
        part = max(_PART_BYTES, -(-n_bytes // _MOST_PARTS))

        def send() -> None:
            obstore.put(self._often, key, path, chunk_size=part, max_concurrency=_PARTS_AT_ONCE)

        self._ask(key, send, writing=True)  # besides, each part is tried often by itself
        if (found := self.size(key)) != n_bytes:
            raise StoreError(f"{self.url}/{key} has {found} bytes after {n_bytes:,} were sent; {_AGAIN}")

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one; says whether it did. Of two writers one succeeds."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        n_tries = 0

        def send() -> bool:
            nonlocal n_tries
            n_tries += 1
            try:
                obstore.put(self._once, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError as error:
                if n_tries == 1 and self.size(key) is not None:
                    return False
                try:
                    return self.read(key) == data  # an earlier try may have arrived though its answer did not
                except ObjectMissing:  # S3 says 409 while somebody else is at the key, of whom nothing may come
                    raise _Again(f"{_reason(error)}, but nothing is there") from error
            return True

        return self._ask(key, send, writing=True)

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        import obstore

        try:
            self._ask(key, lambda: obstore.delete(self._once, key))
        except ObjectMissing:
            return

    def copy(self, source: str, target: str) -> None:
        """Make or replace an object with another's content, within the store: the bytes do not come here."""
        import obstore

        self._ask(source, lambda: obstore.copy(self._once, source, target))

    def list(self, prefix: str = "") -> list[str]:
        """The keys below a folder (of all objects, if it is empty), in order."""
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "", *, some: bool = False) -> dict[str, int]:
        """The same with the bytes of each; with `some` only as many as come in one answer."""
        import obstore

        def listed() -> dict[str, int]:
            found: dict[str, int] = {}
            for batch in obstore.list(self._once, prefix or None):
                found |= {entry["path"]: entry["size"] for entry in batch}
                if len(found) > _MOST_KEYS:
                    raise CacheDamaged(
                        f"{self.url} lists more than {_MOST_KEYS:,} objects, so it is no cache; check the URL"
                    )
                if some:
                    break
            return found

        try:
            return self._ask(prefix, listed)
        except ObjectMissing:  # a folder that was never made
            return {}

    def _ask(self, key: str, request: Callable[[], Answer], *, writing: bool = False) -> Answer:
        """Make a request until it is answered or refused, or the tries are used up."""
        from obstore.exceptions import BaseError

        _check_key(key)
        place = f"{self.url}/{key}" if key else self.url
        if self._once is None:
            self._once = self._often = _folder_at(self.url, make=writing)
        wait, start = self._patience.first_wait, time.monotonic()
        for n_tries in range(1, self._patience.n_tries + 1):
            try:
                return request()
            except FileNotFoundError as error:
                if writing or any(words in str(error) for words in _NO_BUCKET):
                    raise StoreError(f"there is no such bucket: {place}; {_look(place)}") from error
                raise ObjectMissing(f"{place} is not there; check the URL, or make it again") from error
            except (_Again, BaseError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of our own disk
                if refusal := _refusal(place, error):
                    raise StoreError(refusal) from error
                seconds = time.monotonic() - start
                if n_tries == self._patience.n_tries or seconds > 2 * self._patience.request_seconds:
                    tries = f"{n_tries} tries in {seconds:,.0f} s"
                    raise StoreError(f"{place} did not come through ({_reason(error)}; {tries}); {_AGAIN}") from error
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, self._patience.longest_wait)
        raise AssertionError("there is at least one try")


def _folder_at(url: str, *, make: bool) -> Any:
    """The store in a folder. Raises ObjectMissing if there is no folder and none is to be made."""
    from obstore.store import LocalStore

    folder = Path(unquote(urlsplit(url).path))
    try:
        if folder.is_file():
            raise UserError(f"{url} is a file; give the URL of a folder")
        if not make and not folder.is_dir():
            raise ObjectMissing(f"there is nothing at {url}; check the URL, or make it again")
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        return LocalStore(folder)
    except OSError as error:
        if isinstance(error, ObjectMissing):
            raise
        raise StoreError(f"{url} cannot be opened: {error.strerror}; {_look(url)}") from error


class _Again(Exception):
    """Why an answer is none, and the request is made once more."""


def _body(found: Any, n_bytes: int) -> bytes:
    """The content of an answer that has to have so many bytes, whatever its headers say. Further ones are not read."""
    return _whole(next(iter(found.stream(min_chunk_size=n_bytes + 1)), b""), n_bytes)  # that many, or all there are


def _whole(data: bytes, n_bytes: int) -> bytes:
    if len(data) > n_bytes:
        raise _Again(f"more than {n_bytes:,} bytes came")
    if len(data) < n_bytes:
        raise _Again(f"{len(data):,} of {n_bytes:,} bytes came")
    return data


def _check_key(key: str) -> None:
    if key and any(part in ("", ".", "..") for part in key.split("/")):
        raise StoreError(f"{key!r:.200} is no key of a store; its parts may not be empty, '.' or '..'")


def _refusal(place: str, error: Exception) -> str:
    """The sentence for what another try would not change; empty for the rest."""
    kind, text = type(error).__name__, str(error)
    status = int(_status(text).partition(" ")[0] or 0)
    if any(host in text for host in _METADATA_HOSTS):
        return f"there are no credentials for {place}; {_look(place)}"
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403):
        return f"the store refuses {place} ({_reason(error)}); {_look(place)}"
    if place.startswith("file:") and re.search(rf"os error ({'|'.join(map(str, _FINAL))})\)", text):
        return f"the disk refuses {place} ({_reason(error)}); {_look(place)}"
    if "redirect" in text.lower() or status in (301, 307):
        return f"{place} is in another region than the requests name; {_look(place)}"
    if kind == "InvalidPathError":
        name = re.search(r'Path "(.*?)"(?::| contained)', text, re.DOTALL)
        return (
            f"below {place} is an object of a name that none of a cache has, {name[1] if name else ''!r:.300}; delete "
            "that object, or give another URL"
        )
    if status == 404:  # what is asked for of an object is answered otherwise
        return f"there is no such bucket: {place}; {_look(place)}"
    if kind == "NotSupportedError" or (400 <= status < 500 and status not in (408, 409, 429)):
        return f"the store does not take the request for {place} ({_reason(error)}); {_look(place)}"
    return ""


def _look(place: str) -> str:
    scheme = place.partition(":")[0]
    if not SETTINGS[scheme]:
        return "check the folder, your rights to it and the room on its disk"
    return f"check the URL and the environment's {SETTINGS[scheme]}... variables (docs/stores.md)"


def _status(text: str) -> str:
    match = re.search(r"status code: (\d{3}[A-Za-z ]*)", text)
    return match[1].strip() if match else ""


def _reason(error: Exception) -> str:
    """What went wrong in a few words. The library's own text has headers and addresses, which may hold a signature."""
    text = str(error).partition("\n")[0]
    if isinstance(error, _Again):
        return text
    if status := _status(text):
        return status
    match = re.search(r"HTTP error: ([A-Za-z ]+)", text) or re.search(r"([A-Z][A-Za-z -]+) \(os error", text)
    return match[1].strip() if match else type(error).__name__
