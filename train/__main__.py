"""`python -m train`: the command line."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python still imports ends it without a traceback

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from cache_spec.command import app_for, examples, heed, run_command
from train.options import Options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_HELP = """Train sparse autoencoders from an activation cache.

Options marked (grid) are lists, with commas or the option again: every combination is a run, and one read of the
cache feeds all of them. Each run becomes a SAELens v6 folder. (data) and (machine) options are the same for all runs,
(training) ones say how each learns, (run) ones how to watch and go on. docs/recipes.md has whole examples.
"""
_EXAMPLES = (
    "python -m train --cache caches/tiny.zarr --out runs --arch matryoshka \\\n"
    "    --k 4,6,10 --d-sae 512 --masked-fraction 0,0.5 --seed 0,1,2 --resume",
    "python -m train --cache caches/tiny.zarr --out runs --k 6 --d-sae 512 \\\n"
    "    --corrupt gaussian --match-strength 0.5 --seed 0,1,2 --resume",
    "python -m train --cache caches/pythia-160m.zarr --out runs --preset paper \\\n"
    "    --k 20,40,80,160 --d-sae 4096 --device cuda --dry-run",
)


def _as_command(options: type[Options]) -> Callable[..., None]:
    """A function with the fields of `options` as its parameters, for typer."""

    def command(context: typer.Context, **values: Any) -> None:
        # The store of a job prints a page of addresses when its other end is gone; what became of that, we say.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from train.command import run  # this imports torch, which takes seconds; --help should not

        # A scheduler's SIGTERM keeps every step, too. A shell's background jobs ignore Ctrl-C and go on ignoring it.
        heed(signal.SIGINT, signal.SIGTERM)
        given = {name for name in values if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"}
        run(options(**values), given)

    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=field.type,
        )
        for field in dataclasses.fields(options)
    ]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    hints = {parameter.name: parameter.annotation for parameter in (context, *parameters)}
    vars(command).update(__signature__=inspect.Signature([context, *parameters]))
    command.__annotations__ = hints
    return command


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else inspect.Parameter.empty


OTHERS: dict[str, str] = {
    "export": "train.commands.export",
    "import": "train.commands.importing",
    "push": "train.commands.push",
}
"""Commands beside training, by their first word, and the modules of their apps."""

app.command(help=_HELP, epilog=examples(*_EXAMPLES, others=OTHERS))(_as_command(Options))

if __name__ == "__main__":
    run_command(app_for(sys.argv, app, OTHERS))
