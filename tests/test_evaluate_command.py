"""The command: from folders of runs to reports, and one sentence for everything that can be wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cache_fixtures import make_plan, make_shard
from evaluate_fixtures import no_model, small_cache, small_sae, write_four_runs, write_run
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cache_spec import ActivationCache, CacheError, CacheNotFound, UserError, create_cache, finalize_cache, write_shard
from cache_spec.errors import StoreError
from evaluate import measuring
from evaluate.__main__ import app
from evaluate.command import choose_metrics, run
from evaluate.names import available
from evaluate.runs import RunsIncomplete, find_runs, open_cache
from train.run_folder import check_out, without_seal


@pytest.fixture
def cache(tmp_path) -> ActivationCache:
    return small_cache(tmp_path / "cache")


@pytest.fixture
def runs(tmp_path, cache, monkeypatch) -> Path:
    """Two seeds, masked and not, on a made-up cache whose model cannot be had."""
    no_model(monkeypatch)
    return write_four_runs(tmp_path / "runs", cache)


def evaluate(folder: Path, **options: object) -> dict:
    """Run the command for core numbers; the report over all runs."""
    options = {"metrics": "core", "out": folder, **options}
    run(folder, **options)  # pyright: ignore[reportArgumentType]
    return json.loads((Path(str(options["out"])) / "report.json").read_text())


def test_another_models_cache_gets_core_numbers_and_says_what_is_missing(runs, capsys):
    report = evaluate(runs, metrics="")
    printed = capsys.readouterr().out
    assert "'made-up' cannot be had" in printed
    for name in ("absorption", "probing", "recovery"):
        (sentence,) = [text for text in report["missing"] if text.startswith(f"{name} is not measured: it needs")]
        assert sentence in printed
    assert [(r["recipe"], r["kind"]) for r in report["recipes"]] == [
        ("unmasked", "trained"),
        ("masked 0.5", "trained"),
        ("random, L0 matched", "random, L0 matched"),
        ("permuted decoder", "permuted decoder"),
        ("untrained", "untrained"),
    ]
    assert "mcc" not in report["recipes"][0]["metrics"]
    assert report["left_out"] == {}
    for folder in runs.glob("batchtopk*"):
        mine = json.loads((folder / "report.json").read_text())
        nested = mine["eval_result_metrics"]
        assert nested["sparsity"]["l0"] == mine["metrics"]["core"]["l0"] == pytest.approx(3, abs=0.7)
        assert nested["reconstruction_quality"]["explained_variance"] == mine["metrics"]["core"]["explained_variance"]
        assert mine["threshold"]["trained"] == pytest.approx(0.1)
        assert set(mine["missing"]) <= set(report["missing"])
    assert printed.rstrip().endswith(str((runs / "report.html").resolve()))


def test_the_report_names_runs_relative_to_itself_and_no_time(runs):
    report = evaluate(runs)
    paths = [result["path"] for result in report["runs"]]
    assert paths[:4] == sorted(folder.name for folder in runs.glob("batchtopk*unmasked*")) + sorted(
        folder.name for folder in runs.glob("batchtopk*_masked*")
    )
    assert set(paths[4:]) == {None}
    assert str(runs) not in (runs / "report.json").read_text()


def test_one_run_alone_can_be_measured(runs):
    one = next(runs.glob("*unmasked_seed0"))
    mine = evaluate(one)
    assert mine["run"] == one.name  # its own report, not the one over all runs
    assert (one / "report.html").exists()
    assert evaluate(one, out=one.parent)["runs"][0]["run"] == one.name


def test_l0_is_in_the_table_whatever_is_measured(runs):
    report = evaluate(runs, metrics="stability")
    assert report["recipes"][0]["metrics"]["l0"]["mean"] == pytest.approx(3, abs=0.7)
    assert "stability_max_cosine" in report["recipes"][0]["metrics"]
    assert "explained_variance" not in report["recipes"][0]["metrics"]


def test_an_out_that_is_or_is_under_a_file_is_said_before_measuring(runs, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file"):
            evaluate(runs, out=out)
    assert not list(runs.glob("*/report.json"))


def leave_out(runs: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluating leaves out these runs, each with its words, aloud and in the report, and measures the others."""
    with pytest.raises(RunsIncomplete, match=f"{len(expected)} of 4 SAEs") as caught:
        evaluate(runs)
    assert caught.value.exit_code == 1
    printed = capsys.readouterr().out
    report = json.loads((runs / "report.json").read_text())
    assert report["left_out"].keys() == expected.keys()
    for name, words in expected.items():
        assert f"left out {name}: " in printed
        assert words in report["left_out"][name]
        assert words in str(caught.value)
        assert not (runs / name / "report.json").exists()
    measured = {result["run"] for result in report["runs"] if result["kind"] == "trained"}
    assert measured == {folder.name for folder in runs.glob("batchtopk*")} - expected.keys()


def test_unfinished_and_failed_runs_and_transcoders_are_left_out_aloud(runs, capsys):
    half, failed, transcoder, *_ = sorted(runs.glob("*/run.json"))
    facts = json.loads(half.read_text())
    half.write_text(json.dumps({**without_seal(facts), "status": "training"}))
    facts = json.loads(failed.read_text())
    failure = {"step": 312, "reason": "its loss is nan", "checkpoint": 300}
    failed.write_text(json.dumps({**without_seal(facts), "status": "failed", "failure": failure}))
    facts = json.loads(transcoder.read_text())
    transcoder.write_text(
        json.dumps({**without_seal(facts), "data": {**facts.get("data", {}), "target_hook": "layer_3"}})
    )
    words = {half: "--resume", failed: "failed at step 312 (its loss is nan", transcoder: "a transcoder"}
    leave_out(runs, {file.parent.name: text for file, text in words.items()}, capsys)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.json", "{", "is not JSON"),
        ("run.json", "[]", "is not a JSON object"),
        ("run.json", '{"status": "complete"}', "lacks or garbles"),
        ("run.json", '{"status": "complete", "config": 3, "cache": {}}', "config is 3, which is no object"),
        ("cfg.json", "{", "is damaged"),
        ("cfg.json", "[]", "is damaged"),
        ("cfg.json", "{}", "is damaged"),
        ("sae_weights.safetensors", "cut short", "is damaged"),
    ],
)
def test_a_mangled_file_leaves_its_run_out(runs, name, text, words, capsys):
    broken = next(runs.glob("*_masked*_seed1"))
    (broken / name).write_text(text)
    leave_out(runs, {broken.name: words}, capsys)


def test_weights_that_are_cut_nan_or_of_another_width_leave_their_runs_out(runs, cache, tmp_path, capsys):
    cut, bad, other = sorted(runs.glob("batchtopk*"))[:3]
    weights = cut / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    tensors = load_file(bad / "sae_weights.safetensors")
    tensors["W_dec"][0, 0] = torch.nan
    save_file(tensors, bad / "sae_weights.safetensors")
    wide = write_run(tmp_path / "wide", cache, small_sae(0, d_model=8))
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(wide / name, other / name)
    for folder in (bad, other):  # the checksums of run.json would tell before
        facts = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**without_seal(facts), "files": {}}))
    words = {cut: "is damaged", bad: "its W_dec holds NaN or infinity", other: "it reads 8 dimensions"}
    leave_out(runs, {folder.name: text for folder, text in words.items()}, capsys)


def test_a_hook_point_without_an_sae_to_measure_there_is_refused(runs):
    with pytest.raises(UserError, match="--hook is for --sae; runs say their own hook point"):
        evaluate(runs, hook="layer_1")


def test_nothing_that_can_be_measured_is_an_error_before_measuring(runs):
    for file in runs.glob("*/sae_weights.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(RunsIncomplete, match="nothing can be measured; "):
        evaluate(runs)
    assert not (runs / "report.json").exists()


def test_the_report_can_go_elsewhere(runs, tmp_path):
    report = evaluate(runs, out=tmp_path / "new" / "place")
    assert (tmp_path / "new" / "place" / "report.html").exists()
    assert not (runs / "report.html").exists()
    assert report["runs"][0]["path"].startswith("../../runs/")


def test_training_goes_on_in_a_folder_that_was_evaluated(runs, tmp_path):
    evaluate(runs)
    assert (runs / ".evaluate" / "controls").is_dir()
    check_out(runs)
    for folder in runs.glob("batchtopk*"):
        shutil.rmtree(folder)
    check_out(runs)  # reports and hidden folders alone are not in the way of runs


def test_a_moved_cache_is_found_with_the_option_and_asked_for_without(runs, cache, tmp_path):
    moved = shutil.move(cache.path, tmp_path / "elsewhere")
    with pytest.raises(RunsIncomplete, match=r"trained on .*cache.*--cache"):
        evaluate(runs)
    evaluate(runs, cache=Path(moved))
    one = sorted(runs.glob("*/run.json"))[0]
    facts = json.loads(one.read_text())
    one.write_text(json.dumps({**without_seal(facts), "cache": {**facts["cache"], "path": str(moved)}}))
    assert evaluate(runs)["left_out"] == {}  # one run knows where the cache of all is now


def test_a_run_of_a_cache_that_is_gone_is_left_out_and_the_others_are_measured(runs, tmp_path, capsys):
    gone = small_cache(tmp_path / "gone", seed=5)
    shutil.rmtree(next(runs.glob("*_masked*_seed1")))
    run_of_it = write_run(runs, gone, small_sae(7), seed=7)
    shutil.rmtree(gone.path)
    leave_out(runs, {run_of_it.name: "no cache is there now"}, capsys)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("ftp://x/y", "ftp:// is no store"),
        ("s3://me:hush@b/k", "with no '@'"),
        ("s3://caches/x", "AWS_ENDPOINT_URL is no address"),
        ("az://container/x", "cannot be opened"),
        ("file:///etc/passwd/x", "no cache is there now"),
        ("file:///etc/passwd", "is a file"),
        ("file://{}/made/by/stranger", "no cache is there now"),
        ("/" + "x" * 300, "File name too long"),
    ],
)
def test_a_run_whose_file_names_no_place_of_a_cache_is_left_out_and_the_others_are_measured(
    runs, tmp_path, capsys, monkeypatch, place, words
):
    """A run.json may be a stranger's: what it names is neither made nor printed where it may hold a password."""
    pytest.importorskip("obstore")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "garbage")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    shutil.rmtree(next(runs.glob("*_masked*_seed1")))
    theirs = write_run(runs, small_cache(tmp_path / "gone", seed=5), small_sae(7), seed=7)
    facts = json.loads((theirs / "run.json").read_text())
    cache = {**facts["cache"], "path": place.format(tmp_path)}
    (theirs / "run.json").write_text(json.dumps({**without_seal(facts), "cache": cache}))
    leave_out(runs, {theirs.name: words}, capsys)
    assert "hush" not in (runs / "report.json").read_text()
    assert not (tmp_path / "made").exists()


def test_runs_of_a_store_that_stops_to_answer_are_left_out_and_the_others_are_measured(
    runs, tmp_path, capsys, monkeypatch
):
    shutil.rmtree(next(runs.glob("*_masked*_seed1")))
    theirs = write_run(runs, small_cache(tmp_path / "gone", seed=5), small_sae(7), seed=7)
    make_bench = measuring.make_bench

    def stopping(cache, *given, **named):
        if cache.path == tmp_path / "gone":
            raise StoreError("s3://caches/gone did not come through")
        return make_bench(cache, *given, **named)

    monkeypatch.setattr(measuring, "make_bench", stopping)
    leave_out(runs, {theirs.name: "s3://caches/gone did not"}, capsys)


def test_a_cache_option_that_names_no_place_is_refused_before_the_runs(runs):
    with pytest.raises(UserError, match="ftp:// is no store") as caught:
        evaluate(runs, cache="ftp://x/y")
    assert not isinstance(caught.value, RunsIncomplete)


def test_another_cache_in_its_place_is_refused(runs, tmp_path):
    other = make_plan(n_rows=128, n_train_rows=64, seed=9)
    create_cache(tmp_path / "other", other)
    for shard in range(other.n_shards):
        write_shard(tmp_path / "other", other, shard, *make_shard(other, shard))
    finalize_cache(tmp_path / "other")
    first = find_runs(runs)[0][0]
    with pytest.raises(CacheError, match="was trained on"):
        open_cache(first, tmp_path / "other")
    with pytest.raises(CacheNotFound):
        open_cache(first, tmp_path / "nowhere")


def test_bad_folders_get_one_sentence_each(tmp_path, runs):
    with pytest.raises(UserError, match="there is no folder"):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        find_runs(tmp_path / "empty")
    with pytest.raises(UserError, match="there is nothing to measure"):
        run(None, out=tmp_path / "out")
    for file in runs.glob("*/run.json"):
        file.write_text(json.dumps({"status": "training"}))
    with pytest.raises(RunsIncomplete, match="--resume") as caught:
        find_runs(runs)
    assert caught.value.exit_code == 1


def test_a_device_that_is_not_there_is_one_sentence(runs):
    with pytest.raises(UserError, match="--device meta7 cannot be used here"):
        evaluate(runs, device="meta7")


def test_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(UserError, match=f"there is no metric 'fancy'; there are {', '.join(available())}"):
        choose_metrics("core,fancy")
    with pytest.raises(UserError, match="names nothing"):
        choose_metrics(" , ")
    assert [metric.name for metric in choose_metrics("probing, core,core")] == ["core", "probing"]


def test_help_explains_every_option():
    text = CliRunner().invoke(app, ["--help"], terminal_width=200).output
    options = ("metrics", "sae", "cache", "hook", "probe-data", "sae-probes", "shifted-text", "device", "out", "seed")
    for option in (*options, "fresh", "no-sae-probes"):
        assert f"--{option}" in text
    for metric in available():
        assert metric in text
    assert "a txt, jsonl or csv file or a folder" in " ".join(text.split())


def test_every_option_reaches_what_it_decides(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr("evaluate.command.run", lambda folder, **options: seen.update(options, folder=folder))
    arguments = (
        "runs --metrics core --sae a --sae b/c --cache s3://d/e --hook e --probe-data f --probe-data g --sae-probes "
    )
    arguments += "--shifted-text h --device cuda --out i --seed 5 --fresh --cache-dir j --cache-bytes 2GB"
    assert CliRunner().invoke(app, arguments.split()).exit_code == 0
    sources = seen.pop("sources")
    assert (sources.probe_data, sources.sae_probes, sources.shifted_text) == ((Path("f"), Path("g")), True, Path("h"))
    copies = seen.pop("copies")
    assert (copies.folder, copies.n_bytes) == (Path("j"), 2 * 2**30)
    assert seen == {
        "folder": Path("runs"),
        "metrics": "core",
        "saes": ["a", "b/c"],
        "cache": "s3://d/e",
        "hook": "e",
        "device": "cuda",
        "out": Path("i"),
        "seed": 5,
        "fresh": True,
    }
