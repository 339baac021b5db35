"""Contestants made of a few lines: what a worker process says, without torch and without a library."""

import sys
from pathlib import Path

from benchmarks.peers.job import Job

TOY = Job(contestant="granary", arch="topk", d_model=16, d_sae=64, k=4, batch=32, precision="fp32", device="cpu")
_PYTHON = """#!{python} -S
import json, sys
job = json.loads(sys.argv[3])
seconds = {seconds}.get(job["variant"], 0.4)
if job["contestant"] == "unsuited":
    print(json.dumps({{"unsuitable": "it has no " + job["arch"]}}), flush=True)
    sys.exit()
facts = {{"fvu": 0.5, "l0": 4.0, "n_dead": 0}}
print(json.dumps({{"settings": "as it likes", "versions": {{"toy": "1"}}, **facts}}), flush=True)
for n, order in enumerate(sys.stdin, start=1):
    if job["contestant"] == "mortal" and n == 4:
        print("Traceback: something long\\nRuntimeError: out of breath", file=sys.stderr)
        sys.exit(3)
    # a machine that becomes slower and slower, for all alike
    print(json.dumps({{"seconds": seconds * n}} if order.startswith("steps") else facts), flush=True)
"""


def toy_environment(folder: Path, seconds: dict[str, float]) -> Path:
    """An environment whose Python is a contestant: a step takes so long for each variant, in the n-th round n times."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(_PYTHON.format(python=sys.executable, seconds=seconds))
    python.chmod(0o755)
    return folder
