"""The other half of saelens_compat: runs inside .venv-compat, where SAELens is, and imports nothing of ours."""

import sys

from sae_lens import SAE  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file


def main(run: str, rows: str, out: str) -> None:
    """Encode and decode the rows with the SAE that SAELens reads from a run's folder; write both."""
    sae = SAE.load_from_disk(run, device="cpu")
    features = sae.encode(load_file(rows)["x"])
    save_file({"features": features.detach(), "decoded": sae.decode(features).detach()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
