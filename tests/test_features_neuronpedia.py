"""Neuronpedia's files against the fields that it names, and uploads to a stand-in of its interface on this machine."""

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from features_fixtures import DEAD, asked_of, text_run
from typer.testing import CliRunner

from cache_spec import UserError
from evaluate.cache_model import public_name
from evaluate.commands.neuronpedia import app
from evaluate.features.gather import gather
from evaluate.neuronpedia import records
from evaluate.neuronpedia import upload as uploading
from evaluate.neuronpedia.records import Names, write_export
from evaluate.neuronpedia.upload import DONE, KEY, ROUTE, Refused, upload

SECRET = "sk-not-for-any-file"
NAMES = Names(
    model="tiny", source_set="it", source="1-it", release="it", creator="me", creator_id="c1", at="2026-01-01T00:00:00"
)
# Field -> what it has to be, of facts/formats.md 3.5: the route's own schema, and the db_models of its importer.
NUMBER, TEXT = (int, float), (str,)
STRINGS, NUMBERS = [TEXT], [NUMBER]
LOGITS = [{"token": TEXT, "value": NUMBER}]
UPLOAD = {
    "modelId": TEXT,
    "source": TEXT,
    "features": [
        {
            "index": (int,),
            "density?": NUMBER,
            "topLogits?": LOGITS,
            "bottomLogits?": LOGITS,
            "explanations?": [{"text": TEXT, "methodName?": TEXT, "modelName?": TEXT}],
            "activations": [
                {
                    "tokens": STRINGS,
                    "values": NUMBERS,
                    "quantileMax?": NUMBER,
                    "quantileMin?": NUMBER,
                    "quantileFraction?": NUMBER,
                }
            ],
        }
    ],
}
MADE = {"creatorId": TEXT, "createdAt": TEXT}
FEATURE = {
    **MADE,
    **dict.fromkeys(("modelId", "layer", "index", "hookName"), TEXT),
    **dict.fromkeys(("maxActApprox", "frac_nonzero"), NUMBER),
    "hasVector": (bool,),
    "vectorLabel": (type(None), str),
    **dict.fromkeys(("pos_str", "neg_str"), STRINGS),
    **dict.fromkeys(
        (
            *("vector", "topkCosSimIndices", "topkCosSimValues", "pos_values", "neg_values", "decoder_weights_dist"),
            *(f"neuron_alignment_{part}" for part in ("indices", "values", "l1")),
            *(f"correlated_{of}_{part}" for of in ("neurons", "features") for part in ("indices", "pearson", "l1")),
            *(f"{of}_hist_data_bar_{part}" for of in ("freq", "logits") for part in ("heights", "values")),
        ),
        NUMBERS,
    ),
}
ACTIVATION = {
    **MADE,
    **dict.fromkeys(("id", "index", "layer", "modelId", "dataSource", "dataIndex"), TEXT),
    **dict.fromkeys(("maxValue", "minValue", "binMin", "binMax", "binContains"), NUMBER),
    **dict.fromkeys(("maxValueTokenIndex", "qualifyingTokenIndex"), (int,)),
    "tokens": STRINGS,
    "values": NUMBERS,
}
HEADS = {
    "release": {
        **MADE,
        **dict.fromkeys(("name", "description", "creatorName", "visibility", "descriptionShort"), TEXT),
        **{"creatorNameShort": TEXT, "urls": STRINGS},
    },
    "model": {
        **MADE,
        **dict.fromkeys(("id", "displayNameShort", "displayName", "visibility", "updatedAt"), TEXT),
        **{"instruct": (bool,), "dimension": (int,), "layers": (int,)},
    },
    "sourceset": {
        **MADE,
        **dict.fromkeys(("modelId", "name", "creatorName", "releaseName", "description", "visibility"), TEXT),
    },
    "source": {
        **MADE,
        **dict.fromkeys(("id", "modelId", "setName", "visibility", "dataset", "notes"), TEXT),
        **{"hasDashboards": (bool,), "num_prompts": (int,), "num_tokens_in_prompt": (int,)},
    },
}


def check(value: Any, schema: Any, where: str = "it") -> None:
    """The value has exactly the fields of the schema (but those with ?), each of its type."""
    if isinstance(schema, dict):
        wanted = {name.rstrip("?") for name in schema}
        needed = {name for name in schema if not name.endswith("?")}
        assert needed <= value.keys() <= wanted, f"{where}: {value.keys() ^ wanted}"
        for name, part in schema.items():
            if name.rstrip("?") in value:
                check(value[name.rstrip("?")], part, f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for part in value:
            check(part, schema[0], f"{where}[]")
    else:
        assert isinstance(value, schema), f"{where} is {value!r}"
        assert bool in schema or not isinstance(value, bool), f"{where} is {value!r}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, and its export in batches of 6, with what was found."""
    folder = tmp_path_factory.mktemp("neuronpedia")
    run, _, sae = text_run(folder)
    found = gather(asked_of(run))
    (folder / "export").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BATCH", 6)
        bodies, n_live = write_export(found, NAMES, folder / "export")
    return folder, run, sae, found, bodies, n_live


def lines(path: Path) -> list[Any]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


def test_the_bodies_have_the_fields_and_limits_of_the_interface(world):
    _, _, sae, found, bodies, n_live = world
    seen = []
    for path in bodies:
        body = json.loads(path.read_text())
        check(body, UPLOAD)
        assert body["modelId"] == body["modelId"].lower()
        assert body["source"] == "1-it"
        assert 1 <= len(body["features"]) <= 6
        for feature in body["features"]:
            seen.append(feature["index"])
            assert 0 < feature["density"] <= 1
            assert feature["activations"]
            for activation in feature["activations"]:
                assert 1 <= len(activation["tokens"]) == len(activation["values"]) <= 1024
                assert all(activation["tokens"])
                assert 0 <= activation.get("quantileFraction", 0) <= 1
            best = feature["activations"][0]["values"]
            assert max(best) == pytest.approx(found.firings.top.values[feature["index"], 0], rel=1e-4)
    assert seen == [latent for latent in range(sae.d_sae) if latent != DEAD]
    assert n_live == len(seen)


def test_the_export_folder_has_the_fields_that_its_importer_knows(world):
    folder, _, sae, *_ = world
    source = folder / "export" / "tiny" / "1-it"
    for name, schema in HEADS.items():
        (record,) = lines(source / f"{name}.jsonl")
        check(record, schema, name)
    features = [f for n in range(3) for f in lines(source / "features" / f"batch-{n}.jsonl.gz")]
    activations = [a for n in range(3) for a in lines(source / "activations" / f"batch-{n}.jsonl.gz")]
    assert [int(feature["index"]) for feature in features] == list(range(sae.d_sae))
    for feature in features:
        check(feature, FEATURE)
        assert sum(feature["freq_hist_data_bar_heights"]) == round(feature["frac_nonzero"] * 216)
        assert feature["vector"] == pytest.approx(sae.W_dec[int(feature["index"])].tolist(), rel=1e-3)
    for activation in activations:
        check(activation, ACTIVATION)
        assert activation["values"][activation["maxValueTokenIndex"]] == activation["maxValue"]
        assert len(activation["id"]) == 25
        assert activation["values"][activation["qualifyingTokenIndex"]] > 0
    assert len({activation["id"] for activation in activations}) == len(activations)
    assert str(DEAD) not in {activation["index"] for activation in activations}
    assert not list(source.glob("*/batch-3*"))


@contextmanager
def server(answer: Callable[[int], tuple[int, dict[str, str]]]) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A stand-in for Neuronpedia: (address, calls so far: key, body). answer: number of the call -> code, JSON."""
    calls: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == f"/{ROUTE}"
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            calls.append((self.headers["x-api-key"], body))
            code, said = answer(len(calls))
            self.send_response(code)
            if code == 302:
                self.send_header("location", "/elsewhere")
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}", calls
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def send(bodies: list[Path], folder: Path, url: str) -> int:
    return upload(bodies, folder, key=SECRET, url=url, wait_s=0.001)


def test_an_upload_goes_on_after_faults_that_pass_and_sends_nothing_twice(tmp_path, world, capsys):
    bodies = world[4]
    with server(lambda n: (503, {"error": "busy"}) if n in (1, 3) else (200, {"message": "created"})) as (url, calls):
        assert send(bodies, tmp_path, url) == 3
        assert len(calls) == 5
        assert {key for key, _ in calls} == {SECRET}
        taken = [body for n, (_, body) in enumerate(calls, 1) if n not in (1, 3)]
        assert taken == [json.loads(path.read_text()) for path in bodies]
        assert send(bodies, tmp_path, url) == 0
        assert len(calls) == 5
    assert "503: busy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "said", "sentence", "n_calls"),
    [
        (401, {"error": "no such key"}, "refused the upload with 401: no such key; check the key in", 2),
        (400, {"error": "bad", "path": "x"}, "refused the upload with 400: bad; the source set and the source", 2),
        (302, {}, "refused the upload with 302", 2),
        (500, {"error": "Source set not found."}, "6 attempts (500: Source set not found.); the source set and", 7),
    ],
)
def test_a_refusal_is_one_sentence_and_what_was_taken_stays(tmp_path, world, code, said, sentence, n_calls):
    bodies = world[4]
    with server(lambda n: (200, {}) if n == 1 else (code, said)) as (url, calls):
        with pytest.raises(Refused) as error:
            send(bodies, tmp_path, url)
        assert len(calls) == n_calls
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)
    assert json.loads((tmp_path / DONE).read_text()) == {"taken": [bodies[0].name], "url": url}
    assert error.value.exit_code == 1


def test_nobody_there_is_said_after_the_attempts(tmp_path, world):
    with server(lambda n: (200, {})) as (url, _):
        pass
    with pytest.raises(Refused, match=r"did not take batch-00000\.json in 6 attempts"):
        send(world[4], tmp_path, url)


@pytest.mark.parametrize(
    "url", ["http://www.neuronpedia.org", "ftp://localhost", "localhost", "http://127.0.0.1.evil.org"]
)
def test_the_key_does_not_travel_unprotected(tmp_path, world, url):
    with pytest.raises(UserError, match="would send your key unprotected"):
        send(world[4], tmp_path, url)


def test_nothing_is_sent_without_being_asked_or_without_a_key(tmp_path, world, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("a call was made")

    monkeypatch.setattr(uploading, "_post", never)
    monkeypatch.setenv(KEY, SECRET)
    arguments = [str(world[1]), "--out", str(tmp_path / "out"), "--latents", "0-5"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "nothing was sent; 1 upload body in" in done.stdout
    monkeypatch.delenv(KEY)
    done = CliRunner().invoke(app, [*arguments, "--upload"])
    assert isinstance(done.exception, UserError)
    assert f"--upload needs your Neuronpedia key in the environment variable {KEY}" in str(done.exception)


def test_the_command_uploads_an_export_once_and_writes_the_key_nowhere(tmp_path, world, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    out = tmp_path / "out"
    arguments = [str(world[1]), "--out", str(out), "--latents", "0-5", "--set", "My set", "--upload", "--url"]
    with server(lambda n: (200, {})) as (url, calls):
        first = CliRunner().invoke(app, [*arguments, url], catch_exceptions=False)
        again = CliRunner().invoke(app, [*arguments, url], catch_exceptions=False)
    assert "6 latents of" not in again.stdout
    assert "1 of 1 bodies sent" in first.stdout
    assert "holds this export already" in again.stdout
    assert "0 of 1 bodies sent" in again.stdout
    ((key, body),) = calls
    assert (key, body["modelId"], body["source"]) == (SECRET, "tiny", "1-my-set")
    assert "1 never fire and are left out" in first.stdout
    for file in out.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert SECRET.encode() not in (gzip.decompress(data) if file.suffix == ".gz" else data)
            assert str(tmp_path).encode() not in data
    assert SECRET not in first.stdout + again.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--before", "1000", "--after", "40"], "--before 1000 and --after 40 are 1041 tokens with the one between"),
        (["--set", "!!!"], "'!!!' leaves no letter or digit for a name on Neuronpedia"),
        (["--model-id", "?"], "'?' leaves no letter or digit"),
    ],
)
def test_what_neuronpedia_has_no_room_or_name_for_is_said_before_anything_is_read(
    tmp_path, world, monkeypatch, words, said
):
    monkeypatch.setattr("evaluate.neuronpedia.command.gather", None)
    done = CliRunner().invoke(app, [str(world[1]), "--out", str(tmp_path / "out"), *words])
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)


def test_a_tokenizer_that_cannot_be_had_is_said_since_text_is_wanted(tmp_path, world, monkeypatch):
    def unreachable(name: str, **_: object) -> Any:
        raise UserError(f"'{name}' cannot be had")

    monkeypatch.setattr("evaluate.features.words.load_model", unreachable)
    done = CliRunner().invoke(app, [str(world[1]), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, UserError)
    assert "Neuronpedia shows tokens as text, and 'tiny' cannot be had; name the model" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "shown"),
    [("/home/me/models/mine", "mine"), ("EleutherAI/pythia-160m", "EleutherAI/pythia-160m"), ("tiny", "tiny")],
)
def test_a_path_on_this_machine_is_not_for_others_to_read(name, shown):
    assert public_name(name) == shown
