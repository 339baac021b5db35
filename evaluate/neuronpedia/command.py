"""What `python -m evaluate neuronpedia` does: gather, write the export folder and uploads, and upload if asked."""

import dataclasses
import re
from collections.abc import Sized
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cache_spec.errors import UserError
from cache_spec.hook_point import HookPoint
from cache_spec.untrusted import printable
from evaluate.features.folder import check_place, facts_of, whole_folder
from evaluate.features.gather import Asked, Found, gather
from evaluate.features.site import about
from evaluate.neuronpedia.records import MOST_TOKENS, UPLOADS, Names, write_export
from evaluate.neuronpedia.upload import read_key, upload
from evaluate.runs import one_run

MADE_BY = "python -m evaluate neuronpedia"


def run_neuronpedia(
    asked: Asked, out: Path, *, model_id: str, source_set: str, creator: str, creator_id: str, sends: bool, url: str
) -> None:
    """Everything the command does. Raises UserError for what a user can mend.

    A folder that holds this very export is taken as it is, so that an upload goes on where it stopped.
    """
    key = read_key() if sends else ""  # before minutes of reading
    check_place(out, MADE_BY)
    if asked.before + 1 + asked.after > MOST_TOKENS:
        raise UserError(
            f"--before {asked.before} and --after {asked.after} are {asked.before + 1 + asked.after} tokens with the "
            f"one between, and Neuronpedia takes {MOST_TOKENS}; give less"
        )
    run = one_run(asked.run)
    for name in (source_set or run.name, *filter(None, [model_id])):
        _slug(name)
    facts = {
        "made_by": MADE_BY,
        "run": run.name,
        "cache_id": run.cache_id,
        "weights": _stamp(asked.run),
        "asked": {
            name: str(value)
            for name, value in dataclasses.asdict(asked).items()
            if name not in ("run", "cache", "device")
        },
        "names": [model_id, source_set, creator, creator_id],
    }
    if {name: value for name, value in facts_of(out).items() if name in facts} == facts:
        print(f"{out} holds this export already")
    else:
        _write(asked, out, facts, model_id, source_set, creator, creator_id)
    bodies = sorted((out / UPLOADS).glob("batch-*.json"))
    if not sends:
        print(f"nothing was sent; {counted(bodies)} in {(out / UPLOADS).resolve()}, --upload sends what is there")
        return
    n_sent = upload(bodies, out, key=key, url=url)
    print(f"{n_sent} of {len(bodies)} bodies sent to {url}, the others were there before")


def counted(bodies: Sized) -> str:
    """`1 upload body`, `2 upload bodies`."""
    return f"{len(bodies)} upload {'body' if len(bodies) == 1 else 'bodies'}"


def _stamp(run: Path) -> str:
    """The weights' file, by its date and size: another training in the same folder is another export."""
    facts = (run / "sae_weights.safetensors").stat()
    return f"{facts.st_mtime_ns} {facts.st_size}"


def _write(
    asked: Asked, out: Path, facts: dict[str, Any], model_id: str, source_set: str, creator: str, creator_id: str
) -> None:
    found = gather(asked)
    if found.words.missing:
        why = found.words.missing.partition(": ")[2]
        raise UserError(f"Neuronpedia shows tokens as text, and {why}; name the model with --model")
    names = _names(found, model_id, source_set, creator, creator_id)
    with whole_folder(out, facts) as folder:
        uploads, n_live = write_export(found, names, folder)
    left = len(found.shown) - n_live
    what = f"{len(found.shown):,} latents of {found.run.name} as {names.model}/{names.source}"
    print(printable(f"{what}, from {about(found)['rows']}"))
    print(f"{n_live:,} of them in {counted(uploads)}" + (f"; {left:,} never fire and are left out" if left else ""))
    print((out / names.model / names.source).resolve())


def _names(found: Found, model_id: str, source_set: str, creator: str, creator_id: str) -> Names:
    reading = found.reading
    layer = HookPoint.parse(reading.hook.hook_point).layer
    name = source_set or found.run.name
    return Names(
        model=_slug(model_id or str(reading.cache.plan.model.get("id")).partition("@")[0].rpartition("/")[2]),
        source_set=_slug(name),
        source=f"{layer}-{_slug(name)}",
        release=_slug(name),
        creator=creator,
        creator_id=creator_id,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _slug(text: str) -> str:
    """A name as Neuronpedia has them: lower-case letters, digits, dots and dashes."""
    slug = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
    if not slug:
        raise UserError(f"'{text}' leaves no letter or digit for a name on Neuronpedia; give --model-id and --set")
    return slug
