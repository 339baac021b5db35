"""`python -m cache_spec`: what a cache holds, and whether it is whole."""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cache_spec.arguments import path
from cache_spec.command import examples, run_command
from cache_spec.copies import Copies
from cache_spec.hub import Repository
from cache_spec.info import bytes_for_people, describe, summary
from cache_spec.progress import Progress
from cache_spec.pull import plan_pull, pull_cache
from cache_spec.push import bytes_to_push, plan_push, push_cache
from cache_spec.remote import open_cache
from cache_spec.store_path import place_of
from cache_spec.transcode import bytes_to_read
from cache_spec.transcode import transcode as transcode_cache
from cache_spec.untrusted import printable
from cache_spec.verify import bytes_to_check, raise_if_not_whole, verdict, verify_cache

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Look at an activation cache. docs/cache-format.md says what its files are.",
)
CacheFolder = Annotated[
    Path, typer.Argument(parser=path, metavar="CACHE", help="The cache's folder: what harvest got as --out.")
]
CachePlace = Annotated[
    str, typer.Argument(metavar="CACHE", help="The cache's folder or URL: what harvest got as --out.")
]

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else; docs/shell.md has its keys.")
]


@app.command(
    epilog=examples(
        "python -m cache_spec info caches/tiny.zarr",
        "python -m cache_spec info caches/tiny.zarr --json | python -m json.tool",
    )
)
def info(cache: CachePlace, as_json: Json = False) -> None:
    """Say what a cache holds: model, text, hook points, variants, rows, shards, bytes. Reads no activations."""
    with tempfile.TemporaryDirectory() as folder:  # for the small files of one in a store
        opened = open_cache(cache, Copies(folder=Path(folder), n_bytes=0), allow_partial=True)
        print(json.dumps(summary(opened)) if as_json else describe(opened))


@app.command(
    epilog=examples(
        "python -m cache_spec verify caches/tiny.zarr",
        "python -m cache_spec verify caches/tiny.zarr --json > verified.json",
    )
)
def verify(cache: CachePlace, as_json: Json = False) -> None:
    """Read every byte of a cache and compare it with its checksum. Exit code 0 only if all is there and whole."""
    place = place_of(cache)
    n_bytes = bytes_to_check(place)
    with Progress(f"verify {place.name}", n_bytes, "bytes") as progress:
        problems = verify_cache(place, advance=progress.advance)
    if as_json:
        print(json.dumps(verdict(place, n_bytes, problems)))
        raise_if_not_whole(place, problems)
        return
    for problem in problems:
        print(printable(f"{problem.kind}: {problem.file} {problem.what}"))
    raise_if_not_whole(place, problems)
    print(printable(f"{place} is whole: {bytes_for_people(n_bytes)}, every checksum matches"))


@app.command(
    epilog=examples(
        "python -m cache_spec transcode caches/tiny.zarr caches/archives/tiny.zarr",
        "python -m cache_spec transcode caches/archives/tiny.zarr caches/again.zarr",
    )
)
def transcode(
    cache: CacheFolder,
    out: Annotated[
        Path, typer.Argument(parser=path, metavar="OUT", help="New folder; an unfinished one is gone on with.")
    ],
    level: Annotated[int, typer.Option(help="Compression, 1 (fast) to 9 (small).")] = 5,
) -> None:
    """Write a compressed archive of a cache, or from an archive the cache again, to the bit as it was."""
    with Progress(f"transcode {cache.name}", bytes_to_read(cache), "bytes") as progress:
        n_before, n_after = transcode_cache(cache, out, level=level, advance=progress.advance)
    before, after = bytes_for_people(n_before), bytes_for_people(n_after)
    print(f"{out} is whole: {after} from {before}, {n_before / n_after:.2f} to 1; every checksum matched")


@app.command(
    epilog=examples(
        "python -m cache_spec push caches/tiny.zarr --repo user/name --dry-run",
        "python -m cache_spec push caches/tiny.zarr --repo user/name --private",
    )
)
def push(
    cache: CacheFolder,
    repo: Annotated[str, typer.Option(help="Where to: owner/name, a dataset of the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository for you alone.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every file with its size, and the card. Sends nothing.")
    ] = False,
) -> None:
    """Send a whole cache to the Hugging Face hub; what is there already is not sent again. docs/hub.md has more."""
    repository = Repository(name=repo, kind="dataset")
    plan = plan_push(cache, repository)
    if dry_run:
        sizes = {"README.md": len(plan.card.encode())} | {
            name: path.stat().st_size for name, path in plan.files.items()
        }
        print(printable("\n".join([*(f"{size:>15,}  {name}" for name, size in sizes.items()), "", plan.card])))
        print(f"{len(sizes):,} files, {bytes_for_people(sum(sizes.values()))}; nothing was sent")
        return
    with Progress(f"push {cache.name}", bytes_to_push(plan), "bytes") as progress:
        n_sent = push_cache(plan, repository, private=private, advance=progress.advance)
    print(f"{repo} is whole on the hub: {n_sent} of {len(plan.shards)} shards were sent, the others were there")


@app.command(epilog=examples("python -m cache_spec pull user/name caches/tiny.zarr"))
def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A dataset of the Hugging Face hub.")],
    out: Annotated[
        Path, typer.Argument(parser=path, metavar="OUT", help="New folder; an unfinished pull is gone on with.")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: the newest.")] = None,
) -> None:
    """Fetch a cache from the Hugging Face hub and compare every checksum on arrival. docs/hub.md has more."""
    plan = plan_pull(Repository(name=repo, kind="dataset"), revision)
    with Progress(f"pull {repo}", plan.n_bytes, "bytes") as progress:
        n_fetched = pull_cache(plan, out, progress.advance)
    print(f"{out} is whole: {n_fetched} of {plan.plan.n_shards} shards were fetched, every checksum matched")


if __name__ == "__main__":
    run_command(app)
