"""Every command that README.md and docs/ show is run by a test, or marked here and parsed as its own program would.

A command line is one in a block of sh, bash or console, or one that is indented by four spaces and begins like one.
"""

import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from test_house_readme import NOT_RUN
from typer import BadParameter
from typer.main import get_command

from cache_spec import UserError
from completions.commands import commands

ROOT = Path(__file__).parent.parent
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
RUN = {  # all their commands are run, word for word, but for what the test itself lists with a reason
    "README.md": "test_house_readme.py",
    "docs/cache-format.md": "test_cache_docs.py",
    "docs/shell.md": "test_house_shell.py",
}
PARSED = {  # and why they are not run
    "docs/cluster.md": "needs a cluster",
    "docs/evaluation.md": "needs runs on a hub model",
    "docs/features.md": "needs runs of the reader's, and a hub model",
    "docs/formats.md": "needs runs of the reader's; tests/test_train_format_docs.py runs the same commands on its own",
    "docs/harvest.md": "needs hub models, and a cluster",
    "docs/hub.md": "needs a hub repository; tests/test_train_push.py and tests/test_cache_hub.py use a stand-in",
    "docs/log.md": "measurements of minutes to hours",
    "docs/masking-grid.md": "360 SAEs",
    "docs/performance.md": "measurements, some beside other libraries and some on a GPU",
    "docs/probing.md": "needs runs on a hub model",
    "docs/recipes.md": "needs hub models and a GPU",
    "docs/reliability.md": "thousands of faults; those of CI are run by the tests that it names",
    "docs/scale.md": "a check of minutes; tests/test_benchmarks_scale.py compares the tables",
    "docs/stores.md": "needs a bucket; tests/test_harvest_store.py runs the same commands on a server of its own",
    "docs/saebench.md": "needs runs of the reader's; tests/test_evaluate_saebench.py runs the command on its own",
}
OTHERS = ("cd", "git", "pip")  # programs that are not ours
UsageError: Any = BadParameter.__base__  # typer hands on only the one that is below it
LANGUAGES = "sh|bash|console|shell"


def command_lines(text: str) -> list[str]:
    """The command lines of a document, each joined where it was broken, loops taken apart, variables filled in."""
    blocks = re.findall(rf"```(?:{LANGUAGES})\n(.*?)```", text, re.DOTALL)
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\\\n", " ")
    lines = re.findall(r"^    ((?:python|make|\.venv/bin/python) .*)$", outside, re.MULTILINE)
    lines += [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    variables: dict[str, str] = {}
    found = []
    for line in lines:
        line = re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ")
        if loop := re.fullmatch(r"for (\w+) in (\S+).*; do", line):
            variables[loop[1]] = loop[2]
        elif setting := re.fullmatch(r"(\w+)='(.*)'", line):
            variables[setting[1]] = setting[2]
        elif line and line != "done":
            line = re.sub(r"\$(\w+)", lambda name: variables[name[1]], line)
            found += [part.strip() for part in re.split(r"&&|\||> \S+", line) if part.strip()]
    return found


SHOWN = [(name, line) for name, path in DOCUMENTS.items() for line in command_lines(path.read_text())]


def parse(line: str) -> list[dict[str, Any]]:
    """The values that a command line gives to each of our commands in it; typer raises for what it does not take."""
    words = shlex.split(line)
    if words[0] == "make":
        return [values for made in made_by(words[1:]) for values in parse(made)]
    if words[0] == "sbatch":
        return parse(words[words.index("--wrap") + 1].removeprefix("exec "))
    if "-m" not in words:
        assert words[0] in OTHERS, f"what is {words[0]}?"
        return []
    module, *rest = words[words.index("-m") + 1 :]
    if module.startswith("benchmarks.") or module == "completions":
        found = import_module(module if module != "completions" else "completions.__main__")
        app = vars(found).get("app")
        assert app or not rest, f"{module} takes no options"
        return [get_command(app).make_context(module, rest).params] if app and "--help" not in rest else []
    if module in ("json.tool", "pytest"):
        return []
    known = commands()
    name = f"{module} {rest[0]}" if rest and f"{module} {rest[0]}" in known else module
    rest = rest[len(name.split()) - 1 :]
    if "--help" in rest:
        return []
    assert name in known, f"there is no command {name}"
    dry = ["--dry-run"] if any("--dry-run" in parameter.opts for parameter in known[name].params) else []
    return [{"name": name, **known[name].make_context(name, rest + dry).params}]


def made_by(words: list[str]) -> list[str]:
    """The commands of ours that `make` would run; every target and variable must be one of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:.*##"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {name}"
    printed = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = printed.replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"\S*python -m (?!pip|venv|pytest|ruff|pyright)", line)]


@pytest.mark.parametrize(("document", "line"), SHOWN)
def test_every_command_parses(document, line):
    check(line)


def check(line: str) -> None:
    """Parse a command line, and read what its harvests and sweeps are asked for."""
    for values in parse(line):
        if values.get("name") == "harvest":
            check_harvest(values)
        if values.get("name") == "train":
            check_train(values)


def check_harvest(values: dict[str, Any]) -> None:
    from harvest.options import Options, check_options

    names = Options.__dataclass_fields__
    check_options(Options(**{name: value for name, value in values.items() if name in names}))


def check_train(values: dict[str, Any]) -> None:
    from train.options import Options
    from train.reading import read_lists

    names = Options.__dataclass_fields__
    assert read_lists(Options(**{name: value for name, value in values.items() if name in names}))


def test_every_document_with_commands_says_how_they_are_tested():
    assert not set(RUN) & set(PARSED)
    assert {name for name, _ in SHOWN} == {*RUN, *PARSED}, "add the document to RUN or, with the reason, to PARSED"
    for test in RUN.values():
        assert (ROOT / "tests" / test).exists()


def test_what_the_readme_shows_and_does_not_run_has_its_reason():
    assert all(NOT_RUN.values())


def test_the_collector_finds_commands_however_they_are_written():
    text = """
```sh
$ make train K=1 # a comment
for S in 0 1; do
    python -m train --k $S \\
        --out runs && python -m evaluate runs > log
done
```

    python -m harvest --model tiny
    is a word

```python
python -m no
```
"""
    assert command_lines(text) == [
        "python -m harvest --model tiny",
        "make train K=1",
        "python -m train --k 0          --out runs",
        "python -m evaluate runs",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "make cook",
        "make train SPOON=1",
        "make train SEEDS=0 ARCH=",
        "python -m trian",
        "python -m train --cache c --out o --k3 4",
        "python -m train --cache c --out o --batch-size many",
        "python -m train --cache c",
        "sbatch --gpus 1 --wrap 'exec python -m harvest --model tiny --out o --shards 3'",
        "python -m benchmarks.size --fast",
        "rm runs",
    ],
)
def test_a_command_that_nothing_takes_is_found(line):
    with pytest.raises((AssertionError, UserError, UsageError)):
        check(line)
