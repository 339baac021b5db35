"""The model of time and money: it scales as it says, names what limits, and its check compares like with like."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cache_fixtures import make_plan
from typer.testing import CliRunner

from benchmarks import scale, scale_check
from benchmarks.jobs import make_job
from benchmarks.model import Rates, floor_seconds
from benchmarks.scale_model import (
    GEMMA_2_2B,
    Machines,
    cache_bytes,
    harvest_bill,
    link_bytes,
    link_seconds,
    state_bytes,
    sweep_bill,
    transformer,
    wide_bill,
)
from cache_spec import UserError
from cache_spec.layout import cache_bytes as exact_bytes

ONE = Machines(
    gpus=1,
    rates=Rates(100e12, 1e12),
    gpu_bytes=80e9,
    model_share=0.5,
    step_share=0.5,
    dense_share=0.25,
    disk=5e8,
    store=2e9,
    near=100e9,
    far=10e9,
    plan_rate=1e6,
    price=2.0,
)
JOB = make_job("batchtopk", "2304,4096,80,2048", "bf16", "cuda")


def on(gpus):
    return replace(ONE, gpus=gpus)


def test_the_bytes_of_a_cache_are_those_of_the_format():
    plan = make_plan(n_rows=2**16, n_train_rows=2**16, shard_rows=2**14, chunk_rows=1024, d_model=512)
    assert cache_bytes(512, plan.n_rows, 2) == pytest.approx(exact_bytes(plan), rel=0.001)


def test_a_transformers_operations_are_twice_its_weights_and_attention_over_half_a_window():
    model = transformer(8, 3, 32, 10)
    weights = 4 * 8 * 8 + 2 * 8 * 32
    assert model.operations == 3 * (2 * weights + 2 * 2 * 8 * 5)
    gated = transformer(8, 1, 32, 10, heads=16, kv=4, gated=True)
    assert gated.layer_parameters == 8 * 16 * 2 + 8 * 4 * 2 + 3 * 8 * 32
    assert 2.0e9 < GEMMA_2_2B.operations < 2.2e9


def test_gpus_divide_what_they_compute_nodes_what_they_move_and_nothing_the_disk_and_the_plan():
    bills = {gpus: harvest_bill(GEMMA_2_2B, 1e8, 2, on(gpus)) for gpus in (1, 8, 64)}
    model, node, disk = ([bill.parts[name] for bill in bills.values()] for name in bills[1].parts)
    assert model == pytest.approx([model[0], model[0] / 8, model[0] / 64])
    assert node == pytest.approx([node[0], node[0], node[0] / 8])  # eight GPUs are one node
    assert disk == [disk[0]] * 3
    assert [bill.before for bill in bills.values()] == [100.0] * 3


def test_the_time_is_that_of_the_slowest_part_and_planning_comes_before():
    bill = harvest_bill(GEMMA_2_2B, 1e8, 2, on(1))
    assert bill.limit == "the model"
    assert bill.seconds == pytest.approx(100 + 2e8 * GEMMA_2_2B.operations / 50e12)
    assert bill.price(on(1)) == pytest.approx(2.0 * bill.seconds / 3600)
    assert harvest_bill(GEMMA_2_2B, 1e8, 2, on(8)).limit == "a node's link to the disk"
    assert harvest_bill(GEMMA_2_2B, 1e8, 2, on(64)).limit == "the disk"
    assert harvest_bill(GEMMA_2_2B, 1e8, 2, replace(on(64), plan_rate=1e5)).limit == "planning"


def test_saes_are_whole_so_the_fullest_gpu_decides_and_idle_nodes_read_nothing():
    bills = {gpus: sweep_bill(JOB, 10, 1e8, 2, "triton", on(gpus)) for gpus in (1, 4, 8, 16, 64)}
    steps = [bill.parts["training steps"] for bill in bills.values()]
    one = 1e8 / 2048 * floor_seconds(JOB, "triton", ONE.rates) / 0.5
    assert steps == pytest.approx([10 * one, 3 * one, 2 * one, one, one])
    assert bills[64].parts["the disk"] == bills[16].parts["the disk"] == 2 * bills[8].parts["the disk"]


def test_a_wide_sae_divides_its_steps_and_pays_links_beyond_the_node_more():
    wide = replace(JOB, d_sae=2**20)
    assert link_seconds(wide, on(1)) == 0
    assert link_seconds(wide, on(8)) < link_seconds(wide, on(16)) / 5
    one, eight = (wide_bill(wide, 1e9, 1, "triton", on(gpus)) for gpus in (1, 8))
    step = floor_seconds(wide, "triton", ONE.rates) / 0.5
    assert one.parts["training steps"] == pytest.approx(1e9 / 2048 * step)
    assert eight.parts["training steps"] == pytest.approx(1e9 / 2048 * (step / 8 + link_seconds(wide, on(8))))
    assert "links between GPUs" in wide_bill(wide, 1e9, 1, "triton", replace(on(64), far=1e9)).parts
    dense = wide_bill(wide, 1e9, 1, "dense", ONE).parts["training steps"]
    assert dense == pytest.approx(1e9 / 2048 * floor_seconds(wide, "dense", ONE.rates) / 0.25)


def test_what_gpus_send_each_other_depends_on_the_architecture_and_on_the_dead():
    def wide(arch, dead=0.0):
        return replace(JOB, arch=arch, d_sae=2**20, dead=dead)

    reconstruction = 8 * 63 / 64 * 2048 * 2304
    assert link_bytes(wide("standard"), 64) == reconstruction
    assert link_bytes(wide("topk"), 64) - reconstruction == 63 * 80 * 2048 * 2  # k from each of the others, in bf16
    assert link_bytes(wide("batchtopk"), 64) - reconstruction < 1.3 * 80 * 2048 * 2
    assert link_bytes(wide("matryoshka"), 64) > 5 * reconstruction
    auxk = link_bytes(wide("topk", 0.1), 64) - link_bytes(wide("topk"), 64) - reconstruction
    assert auxk == pytest.approx(63 * 60.4 * 2048 * 2, rel=0.01)  # a share is 18; all of the best would be 1152
    assert link_bytes(wide("topk", 1e-6), 64) == link_bytes(wide("topk"), 64) + reconstruction


def test_a_wide_saes_memory_is_divided_and_the_dense_kernel_needs_more():
    wide = replace(JOB, d_sae=2**20)
    assert state_bytes(wide, "triton", 8) == state_bytes(wide, "triton", 1) / 8 == 14 * 2 * 2304 * 2**20 / 8
    assert state_bytes(wide, "dense", 1) == 18 * 2 * 2304 * 2**20 + 4 * 2 * 2048 * 2**20
    dead = replace(wide, dead=0.25)
    assert {state_bytes(dead, name, 1) - state_bytes(wide, name, 1) for name in ("triton", "dense")} == {2**13 * 2**19}


def test_the_table_has_every_number_of_gpus_and_its_limit():
    done = CliRunner().invoke(
        scale.app, ["table", "--gpus", "1,8", "--tokens", "500M", "--gpu-gb", "60", "--price", "3"]
    )
    assert done.exit_code == 0, done.output
    assert "cache of 500,000,000 rows, clean and masked: 4.62 TB" in done.output
    rows = re.findall(r"^ +(\d+) .*?([\d,]+)   (the model|a node's link|training steps)", done.output, re.MULTILINE)
    assert [int(gpus) for gpus, _, _ in rows] == [1, 8] * 3
    assert all(float(price.replace(",", "")) > 0 for _, price, _ in rows)
    assert "1 GPUs, kernel triton: 71.1 GB on each, does NOT fit into 60.0 GB" in done.output
    assert "8 GPUs, kernel dense: 15.6 GB on each, fits" in done.output


def test_the_page_shows_what_the_command_prints_today():
    done = CliRunner().invoke(scale.app, ["table"])
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    assert f"```\n{done.output}```" in page


@pytest.mark.parametrize("text", ["", "0", "1,x", "-1"])
def test_numbers_of_gpus_are_read(text):
    with pytest.raises(UserError, match="--gpus is"):
        scale.parse_gpus(text)
    assert scale.parse_gpus("1, 8") == [1, 8]


def test_the_first_of_a_kind_calibrates_and_the_others_are_predicted_by_it():
    lines, share = scale_check.predicted(["a", "b"], [1.0, 3.0], [2.0, 7.0])
    assert share == 0.5
    assert [(line.predicted, line.measured, line.calibrates) for line in lines] == [(2, 2, True), (6, 7, False)]


def test_the_check_has_a_line_for_each_thing_and_the_ratio_is_of_its_two_times(monkeypatch):
    """The commands that it starts are replaced: they take long, and tests of their own."""

    def output(words):
        if "--tokens" in words and words[words.index("--tokens") + 1] == str(40 * 32):  # the longer of two trainings
            time.sleep(0.1)
        return "16,000 tokens in 2 variants in 1.5 s (10,667 tokens/s in all)"

    monkeypatch.setattr(scale_check, "start", lambda *words: words)
    monkeypatch.setattr(scale_check, "output", output)
    done = CliRunner().invoke(scale.app, ["check", "--toy", "--rounds", "1", "--tokens", "8k"])
    assert done.exit_code == 0, done.output
    lines = re.findall(r"^(\w.*?) {2,}([\d,.]+) (m?s) +([\d,.-]+) (m?s) +(-?[\d,.]+|-)$", done.output, re.MULTILINE)
    kinds = [what.split(" ")[0] for what, *_ in lines]
    assert kinds == ["forward"] * 2 + ["planning"] * 3 + ["harvest"] * 2 + ["step"] * 2 + ["20"] * 2
    for what, predicted, _, measured, unit, ratio in lines[:9]:
        if ratio != "-" and unit == "ms" and float(ratio) > 0.1:
            times = [float(text.replace(",", "")) for text in (predicted, measured)]
            assert times[0] / times[1] == pytest.approx(float(ratio), rel=0.2, abs=0.02), what
    assert re.search(r"shares: the forward keeps \d+% .*, a step \d+% of its floor", done.output)


def test_a_command_that_fails_is_said():
    class Failed:
        returncode = 2

        def communicate(self):
            return "error: no room", None

    with pytest.raises(UserError, match="a command ended with code 2: error: no room"):
        scale_check.output(Failed())  # pyright: ignore[reportArgumentType]
