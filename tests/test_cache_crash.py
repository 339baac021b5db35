"""A writer that dies at each system call that changes a file: nothing half-made looks whole."""

import os
import subprocess
import sys
from pathlib import Path

from cache_fixtures import make_plan, scratch

from cache_spec import shard_files

ROOT = Path(__file__).parent.parent

# Forks one child per crash point. The child exits without cleaning up just before its n-th call; the parent looks at
# what is left, then finishes the cache as the next writer would.
CRASHER = """
import os, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from cache_fixtures import make_cache, make_plan, make_shard
from cache_spec import *

plan = make_plan(n_rows=100)
CALLS = ("write", "replace", "link", "unlink")  # those that change what another process sees

def die_before(n):
    left = [n]
    def wrapped(call):
        def counted(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return call(*args, **kwargs)
        return counted
    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))

def crashes(path, n):
    child = os.fork()
    if child == 0:
        die_before(n)
        make_cache(path, plan)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

def check(path, n):
    try:
        cache = ActivationCache.open(path)
        whole = True
    except CacheIncomplete as error:
        whole = False
    except CacheNotFound:
        return "absent" if not (path / "zarr.json").exists() else "WRONG: a cache that was begun is not recognised"
    if not (path / "_granary/plan.json").exists():
        return "begun"
    problems = [p for p in verify_cache(path) if p.kind == "damaged"]
    if problems:
        return f"WRONG: damaged {{problems[0]}}"
    cache = ActivationCache.open(path, allow_partial=True)
    for shard in cache.shards:
        rows = cache.activations("layer_1", "masked", shard)
        if rows.tobytes() != make_shard(plan, shard)[0]["layer_1", "masked"].tobytes():
            return f"WRONG: rows of shard {{shard}}"
    if whole and len(cache.shards) != plan.n_shards:
        return "WRONG: opened as whole"
    return "whole" if whole else f"{{len(cache.shards)}} shards"

root, n = Path(sys.argv[1]), 0
while crashes(root / str(n), n):
    print(check(root / str(n), n))
    make_cache(root / str(n), plan)
    left = verify_cache(root / str(n))
    if left:
        print(f"WRONG: after the next writer {{left}}")
    n += 1
"""


def test_a_crash_before_any_system_call_is_survived():
    code = CRASHER.format(paths=[str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with scratch() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=environment, check=False
        )
    assert done.returncode == 0, done.stderr
    states = done.stdout.split("\n")[:-1]
    assert not [state for state in states if state.startswith("WRONG")]
    assert list(dict.fromkeys(states)) == ["absent", "begun", "0 shards", "1 shards", "2 shards", "whole"]
    assert len(states) > 5 * len(shard_files(make_plan(), 0)), "few calls were counted"
