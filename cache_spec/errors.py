"""Errors a user can cause or meet. Each message says what was found, what was wanted, and what to do."""


class UserError(ValueError):
    """Input that cannot be used. A command prints its one sentence and exits with `exit_code`."""

    exit_code = 2


class CacheError(UserError):
    """An activation cache that cannot be used as asked."""


class CacheNotFound(CacheError, FileNotFoundError):
    """There is no cache at the path, or the path holds something else."""


class CacheIncomplete(CacheError):
    """The cache was not finished; some of its shards are missing."""

    exit_code = 1


class CacheDamaged(CacheError):
    """A file of the cache is missing, has the wrong size, or fails its checksum."""

    exit_code = 1


class CacheTooNew(CacheError):
    """The cache was written by a newer granary than this one."""


class CacheConflict(CacheError):
    """The output folder holds another plan, or files that are not a cache."""


class DiskFull(UserError):
    """The disk filled up. What was committed stays; the same command goes on from there."""

    exit_code = 1


class StoreError(UserError):
    """An object store said no, or did not answer. What has arrived there or here stays."""

    exit_code = 1


class ObjectMissing(CacheError, FileNotFoundError):
    """An object store has nothing under the key."""

    exit_code = 1


class RoomTooSmall(UserError):
    """What is open at the same time does not fit into the bytes that copies of remote caches may take."""
