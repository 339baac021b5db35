"""The README's commands, typed as a user would: every one that needs no network runs, word for word."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Commands that are not run here, each with its reason. Anything else that the README shows is run.
NOT_RUN = {
    "git clone": "needs the address of the repository",
    "python -m harvest --model pythia-160m": "needs the model hub and a GPU",
    "python -m train --preset paper": "follows it",
    "python -m evaluate runs/pythia-160m": "follows it",
    "make harvest MODEL=path/to/model": "needs a model and a text of the reader's",
    "make train ARCH=matryoshka K=20,40": "follows it",
    "make check": "what CI runs beside the tests",
    "make test": "this is it",
}


def shell_lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked and new files, with this checkout's .venv, so that nothing of the user's is touched."""
    folder = tmp_path_factory.mktemp("readme") / "granary"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)  # with its date: a newer constraints.txt would mean a new .venv
    if not (ROOT / ".venv").exists():
        pytest.skip("the README's commands need .venv; make setup makes it")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


@pytest.mark.commands
def test_the_readme_commands_do_what_they_say(checkout):
    seen = []
    for line in shell_lines():
        if any(line.startswith(start) for start in NOT_RUN):
            continue
        if line == "make evaluate" and not (checkout / "runs").exists():
            continue  # the one after the reader's model; the embedded model's runs come later
        done = run(line, checkout)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        seen.append(line)
    assert "make demo" in seen
    assert "make evaluate" in seen
    for report in ("demo/runs", "runs"):
        assert (checkout / report / "report.html").stat().st_size > 10_000
        assert (checkout / report / "report.json").exists()
    (example,) = re.findall(r'load_from_disk\("(.*?)"\)', (ROOT / "README.md").read_text())
    assert (checkout / example / "sae_weights.safetensors").exists()


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DEMO_SIZE": "small", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_exception_names_a_command_the_readme_has():
    lines = shell_lines()
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in lines), f"the README no longer shows '{start}'"


def test_the_readme_names_every_room_and_the_first_screen_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    first_screen = "\n".join(text.splitlines()[:24])
    assert "git clone" in first_screen
    assert "make demo" in first_screen
    for room in ("harvest", "train", "evaluate", "cache_spec"):
        assert f"python -m {room}" in text


def test_links_in_the_documents_lead_somewhere():
    for document in [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_makefile_targets_are_phony_and_described():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())  # pyright: ignore[reportOptionalSubscript]
    targets = set(re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE))
    assert targets == phony
    assert not [t for t in targets if not re.search(rf"^{t}:.*##", text, re.MULTILINE)]
