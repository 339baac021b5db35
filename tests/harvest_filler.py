"""Harvests onto a small disk of its own that fills up in mid-harvest, then again when there is room.

unshare -rm python tests/harvest_filler.py FOLDER MODEL TEXT prints what the full disk led to; FOLDER becomes the disk.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from harvest_fixtures import request_for
from pipeline_fixtures import files_of

from cache_spec import ActivationCache, DiskFull
from harvest import run, target
from harvest.model import load_model

DISK_BYTES = 1_500_000


def main(folder: Path, model: str, text: Path) -> None:
    loaded = load_model(model)
    request = request_for(loaded, text)
    run.harvest(loaded, request, folder / "whole")
    wanted = files_of(folder / "whole")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True)
    out, other, real = folder / "cache", folder / "other", target.write_shard

    def write(path, plan, shard, *arrays, **how):
        if shard == 2:  # somebody else takes the disk: what is left holds part of a shard
            free = int(subprocess.check_output(["df", "--output=avail", "-B1", folder]).split()[1])
            other.write_bytes(bytes(free - 50_000))
        return real(path, plan, shard, *arrays, **how)

    target.write_shard = write
    try:
        run.harvest(loaded, request, out)
    except DiskFull as error:
        print("DiskFull:", error)
    n_there = len(ActivationCache.open(out, allow_partial=True).shards)
    print(f"{n_there} shards, {len(list(out.rglob('*.partial')))} half-written files")
    other.unlink()
    target.write_shard = real
    run.harvest(loaded, request, out)
    print("the same bytes" if files_of(out) == wanted else "other bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
