"""benchmarks.faithful: its table compares what it says it compares."""

import re

import pytest
from train_fixtures import make_training_cache

from benchmarks.faithful import main
from cache_spec import UserError
from train.names import available


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_training_cache(tmp_path_factory.mktemp("faithful") / "cache").path


def run(cache, capsys, arch: str = "", steps: int = 60) -> dict[str, list[float]]:
    main(cache=cache, hook="", steps=steps, batch_size=32, d_sae=64, k=3, lr=1e-3, arch=arch)
    lines = capsys.readouterr().out.splitlines()[2:]
    return {line.split()[0]: [float(text) for text in re.split(r"[\s|]+", line.strip())[1:]] for line in lines}


def test_ours_and_the_plain_statement_agree_on_a_cache(cache, capsys):
    table = run(cache, capsys)
    assert list(table) == available("architectures")
    for loss, plain_loss, explained, plain_explained, l0, plain_l0, single, double in table.values():
        assert single < 1e-5
        assert double < 1e-12
        assert loss == pytest.approx(plain_loss, rel=1e-2)
        assert explained == pytest.approx(plain_explained, abs=1e-2)
        assert l0 == pytest.approx(plain_l0, rel=1e-2)


def test_a_difference_would_be_seen(cache, capsys, monkeypatch):
    monkeypatch.setattr("tests.plain_trainers.PlainTrainer.learning_rate", lambda self: 1.1 * self.setup.lr)
    ((*_, single, double),) = run(cache, capsys, "topk", steps=20).values()
    assert single > 1e-3
    assert double > 1e-3


def test_without_rows_to_score_on_it_says_so(tmp_path, capsys):
    cache = make_training_cache(tmp_path / "cache", n_held_out=0)
    with pytest.raises(UserError, match="held-out"):
        run(cache.path, capsys)
