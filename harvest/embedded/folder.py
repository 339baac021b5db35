"""Where the embedded model lies, and which activation of it is worth looking at."""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
HOOK_POINT = "resid_post.2"  # the last layer, before the final norm: here the hero has reached the slot
