"""The other half of saelens_compat: runs inside .venv-compat, where SAELens is, and imports nothing of ours."""

import sys

from sae_lens import SAE  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file


def main(run: str, rows: str, out: str) -> None:
    """Encode the rows with the SAE that SAELens reads from a run's folder, and run them through it; write both."""
    sae = SAE.load_from_disk(run, device="cpu")
    x = load_file(rows)["x"]
    save_file({"features": sae.encode(x).detach(), "made": sae(x).detach()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
