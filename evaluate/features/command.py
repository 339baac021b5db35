"""What `python -m evaluate features` does: gather, write the site, say where it is and how large."""

from pathlib import Path

from cache_spec.untrusted import printable
from evaluate.features.folder import check_place
from evaluate.features.gather import Asked, gather
from evaluate.features.site import MADE_BY, about, write_site


def run_features(asked: Asked, out: Path) -> None:
    """Everything the command does. Raises UserError for what a user can mend."""
    check_place(out, MADE_BY)  # before minutes of reading
    found = gather(asked)
    said = about(found)
    if said["missing"]:
        print(printable(f"note: {said['missing']}"))
    facts = {
        "run": found.run.name,
        "cache_id": found.run.cache_id,
        "latents": asked.latents,
        "rows": found.firings.n_rows,
        "seed": asked.seed,
    }
    n_bytes = write_site(found, out, facts)
    n = len(found.shown)
    print(printable(f"{n:,} latent{'s' if n > 1 else ''}, {said['dead']:,} of them dead, from {said['rows']}"))
    print(f"{n_bytes:,} bytes, {n_bytes / n:,.0f} a latent; open {(out / 'index.html').resolve()}")
