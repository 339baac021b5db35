"""`python -m completions`: print the script that completes granary's commands in bash and zsh."""

import typer

from cache_spec.command import examples, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    help="Print a script that completes `python -m harvest|train|evaluate|cache_spec`, their options and the names "
    "that options take, in bash and zsh.",
    epilog=examples("python -m completions > ~/.granary-completions"),
)
def completions() -> None:
    from completions.script import script  # this imports every command

    print(script(), end="")


if __name__ == "__main__":
    run_command(app)
