"""`python -m train push RUNS --repo owner/name`: finished SAEs to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from cache_spec.arguments import path
from cache_spec.command import examples

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    epilog=examples(
        "python -m train push runs --repo user/name --dry-run",
        "python -m train push runs --repo user/name --private",
        "python -m train push runs/batchtopk_d512_k6_seed0 --repo user/name",
    )
)
def push(
    runs: Annotated[
        Path, typer.Argument(parser=path, metavar="RUNS", help="What train wrote with --out, or one run in it.")
    ],
    repo: Annotated[str, typer.Option(help="Where to: owner/name, a model of the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository for you alone.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every file with its size, and the card. Sends nothing.")
    ] = False,
) -> None:
    """Push finished runs to the Hugging Face hub, where SAELens opens them: weights, config, report and a card.

    Log in before with `hf auth login`, or put a token that may write into HF_TOKEN. docs/hub.md has more.
    """
    # These import torch, which takes seconds; --help should not.
    from cache_spec.hub import Repository
    from cache_spec.untrusted import printable
    from train.card import model_card
    from train.pushing import files_to_push, push_files, read_report, read_runs

    repository = Repository(name=repo, kind="model")
    found = read_runs(runs)
    card = model_card(found, repository)
    files = files_to_push(found, read_report(runs), card)
    sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in files.items()}
    if dry_run:
        print(printable("\n".join([*(f"{size:>15,}  {name}" for name, size in sizes.items()), "", card])))
        print(f"{len(sizes):,} files, {sum(sizes.values()):,} bytes; nothing was sent")
        return
    push_files(files, repository, private=private)
    print(
        f"{len(found)} SAEs are at {repo} on the hub; load one with SAE.from_pretrained('{repo}', '{found[0].sae_id}')"
    )
