"""The harvest benchmark at toy size: it runs, and its table is made of what it says."""

import re

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import harvest as benchmark


@pytest.mark.parametrize("compile", [False, True])
def test_the_table_has_a_ratio_for_each_round_and_their_median(compile, monkeypatch):
    asked = []
    real = benchmark.open_reader

    def open_plain_reader(loaded, hook_points, *, compile=False):
        asked.append(compile)
        return real(loaded, hook_points)  # a compiler takes a minute, and may not be there

    monkeypatch.setattr(benchmark, "open_reader", open_plain_reader)
    monkeypatch.setattr(benchmark.run, "open_reader", open_plain_reader)
    options = ["--toy", "--tokens", "6k", "--rounds", "3", *(["--compile"] if compile else [])]
    done = CliRunner().invoke(benchmark.app, options)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if re.match(r"\d +[\d,]+ ", line)]
    bare, harvest, shards, of_harvest, of_shards = np.array(
        [[float(f.replace(",", "")) for f in r[1:]] for r in rows]
    ).T
    np.testing.assert_allclose(harvest / bare, of_harvest, rtol=0.02, atol=1e-3)
    np.testing.assert_allclose(shards / bare, of_shards, rtol=0.02, atol=1e-3)
    assert (harvest < shards).all()
    median = next(line.split()[1:] for line in done.output.splitlines() if line.startswith("median"))
    np.testing.assert_allclose([float(field) for field in median], [np.median(of_harvest), np.median(of_shards)])
    saved = [float(share) for share in re.findall(r"^p = [\d.]+ +([\d.]+)%", done.output, re.MULTILINE)]
    assert len(saved) == 3
    assert saved == sorted(saved)
    assert any(asked) == compile


def test_the_bare_model_reads_what_a_harvest_without_reuse_reads(tmp_path):
    tokenizer = benchmark.make_tokenizer()
    shape = benchmark.toy_shape(len(tokenizer))
    benchmark.save_model(shape, tokenizer, tmp_path / "model")
    benchmark.write_text(tmp_path / "text.txt", 6000)
    loaded = benchmark.load_model(str(tmp_path / "model"))
    options = benchmark.Options(
        dataset=str(tmp_path / "text.txt"), layers="1", tokens="6k", context=shape.window_tokens
    )
    request = benchmark.make_request(loaded, loaded.name, options)
    with benchmark.open_reader(loaded, request.hook_points) as reader:
        job = benchmark.open_job(loaded, reader, request, 0, pad=False)
        read, real = [], reader.read
        reader.read = lambda tokens: (read.append(tokens.numpy().copy()), real(tokens))[1]
        benchmark.pass_seconds(benchmark.replace(job, worth=benchmark.NEVER), job.plan.n_shards)
    bare = benchmark.all_batches(job)
    assert len(read) == len(bare)
    assert all(np.array_equal(a, b) for a, b in zip(read, bare, strict=True))
    assert sum(tokens.numel() for tokens in bare) >= 2 * job.plan.n_rows


@pytest.mark.parametrize("shape", [benchmark.cpu_shape, benchmark.gpu_shape])
def test_the_models_have_the_shapes_that_they_are_named_after(shape):
    found = shape(2004)
    assert (found.config.hidden_size, found.layer) in ((512, 3), (2304, 12))
    assert found.layer < found.config.num_hidden_layers
    assert found.config.intermediate_size == 4 * found.config.hidden_size
