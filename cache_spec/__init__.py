"""The cache format: what harvest writes and train reads. See docs/cache-format.md."""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # `python -m cache_spec` imports this first; see train/__main__.py

from cache_spec.cache import ActivationCache
from cache_spec.command import run_command
from cache_spec.commit import write_shard
from cache_spec.create import create_cache, finalize_cache
from cache_spec.errors import (
    CacheConflict,
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheNotFound,
    CacheTooNew,
    DiskFull,
    StoreError,
    UserError,
)
from cache_spec.hook_point import HookPoint
from cache_spec.layout import (
    FLAG_BOS,
    FLAG_PAD,
    FLAG_SPECIAL,
    FLAG_VALID,
    FP16_MAX,
    cache_bytes,
    column_types,
    shard_files,
)
from cache_spec.moments import Moments, ordinary_rows
from cache_spec.plan import HookPlan, Plan, VariantPlan
from cache_spec.progress import Progress
from cache_spec.seeds import derive_seed
from cache_spec.state import committed_shards
from cache_spec.transcode import transcode
from cache_spec.verify import Problem, verify_cache

__all__ = [
    "FLAG_BOS",
    "FLAG_PAD",
    "FLAG_SPECIAL",
    "FLAG_VALID",
    "FP16_MAX",
    "ActivationCache",
    "CacheConflict",
    "CacheDamaged",
    "CacheError",
    "CacheIncomplete",
    "CacheNotFound",
    "CacheTooNew",
    "DiskFull",
    "HookPlan",
    "HookPoint",
    "Moments",
    "Plan",
    "Problem",
    "Progress",
    "StoreError",
    "UserError",
    "VariantPlan",
    "cache_bytes",
    "column_types",
    "committed_shards",
    "create_cache",
    "derive_seed",
    "finalize_cache",
    "ordinary_rows",
    "run_command",
    "shard_files",
    "transcode",
    "verify_cache",
    "write_shard",
]
