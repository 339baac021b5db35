"""The sparse kernel beside the dense one: the same codes, losses and updates, from sums over what is on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_fixtures import run_config

from cache_spec import UserError
from train.activations import BatchTopK, JumpReLU, TopK
from train.kernels import Job, select
from train.kernels._choose import choose_batchtopk, choose_jumprelu, choose_topk
from train.kernels._cost import saving
from train.kernels._entries import Entries, by_latent, row_starts
from train.kernels._search import Groups, batch_bound, row_bounds
from train.kernels._sums import dots, row_dots, weighted_sums
from train.step import TrainRun, recipe_of

D_MODEL, D_SAE, K = 13, 72, 4  # 72 makes groups of 8 and of 2


def rows(seed: int, n: int = 37, width: int = D_MODEL, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu() + 0.2
    return (x / x.square().sum(1).mean().sqrt()).to(dtype)


@pytest.fixture(autouse=True)
def one_thread():
    """Small steps are the slower for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_run(
    kernel: str, *, n_steps: int = 60, dtype: torch.dtype = torch.float64, d_out: int | None = None, **changes
) -> TrainRun:
    changes = {"d_sae": D_SAE, "k": K, "lr": 1e-2, "dead_tokens": 150, "sparsity_warmup_steps": 3} | changes
    run = TrainRun(run_config(**changes), D_MODEL, n_steps, select(kernel, "cpu"), dtype=dtype, d_out=d_out)
    run.start_at(rows(0, dtype=dtype), None if d_out is None else rows(0, dtype=dtype)[:, :d_out])
    return run


def sparse_from_here(run: TrainRun) -> None:
    """Let jumprelu's steps be sparse, however many codes are on."""
    run._engine.restore({"kernel.density": torch.zeros(())})


CASES = {
    "topk": {"arch": "topk"},
    "batchtopk": {"arch": "batchtopk"},
    "matryoshka": {"arch": "matryoshka"},
    "jumprelu": {"arch": "jumprelu", "bandwidth": 0.2},
    "jumprelu whose window reaches 0": {"arch": "jumprelu", "bandwidth": 0.9},
    "free decoder": {"arch": "batchtopk", "decoder": "free"},
    "no clipping": {"arch": "topk", "clip_norm": 0.0},
    "few for auxk": {"arch": "batchtopk", "aux_k": 2},
    "without auxk": {"arch": "matryoshka", "penalties": ("auxk=0",)},
    "transcoder": {"arch": "matryoshka", "d_out": 5},
    "transcoder with skip": {"arch": "matryoshka", "d_out": 5, "skip": True},
    "topk transcoder with skip": {"arch": "topk", "d_out": D_MODEL, "skip": True},
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_dense_kernel(name):
    """Thirty of them, some with dead latents, in double precision: only the clipping's divisor is single."""
    changes = dict(CASES[name])
    d_out = changes.pop("d_out", None)
    runs = [make_run(kernel, d_out=d_out, **changes) for kernel in ("dense", "sparse")]
    n_dead = 0
    for step in range(30):
        sparse_from_here(runs[1])
        x = rows(step)
        target = x if d_out is None else x[:, :d_out] * x[:, 3 : 3 + d_out] if d_out < D_MODEL else x.flip(1)
        ours, plain = (run.step(x, target) for run in reversed(runs))
        torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.reconstruction, plain.reconstruction, rtol=1e-5, atol=1e-6)
        assert ours.n_active == plain.n_active
        if plain.smallest is not None:
            torch.testing.assert_close(ours.smallest, plain.smallest, rtol=1e-5, atol=0)
        n_dead += int(runs[0].dead().sum())
    plain, ours = (run.state() for run in runs)
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert n_dead > 0


@pytest.mark.parametrize("name", CASES)
def test_one_step_without_clipping_is_equal_to_rounding(name):
    changes = {"clip_norm": 0.0, "dead_tokens": 1} | CASES[name] | {"clip_norm": 0.0}
    d_out = changes.pop("d_out", None)
    runs = [make_run(kernel, d_out=d_out, **changes) for kernel in ("dense", "sparse")]
    for step in range(3):
        sparse_from_here(runs[1])
        x = rows(step)
        target = x if d_out is None else x[:, :d_out]
        losses = [run.step(x, target).loss.item() for run in runs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-13)
    plain, ours = (run.state() for run in runs)
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_bfloat16_finds_the_codes_of_a_transcoder_whose_input_has_a_large_mean(arch):
    """One dimension a hundred times the others, as in language models, which b_enc has learnt to undo."""
    changes: dict[str, Any] = {"arch": arch, "precision": "bf16", "d_sae": 2048, "k": 16, "penalties": ("auxk=0",)}
    run = make_run("sparse", dtype=torch.float32, d_out=5, clip_norm=0.0, **changes)
    x = torch.randn(256, D_MODEL, generator=torch.Generator().manual_seed(0))
    x[:, 7] += 300
    with torch.no_grad():
        run.sae.b_enc.copy_(-x.mean(0) @ run.sae.W_enc)
        pre = run.sae.pre_activations(x)
    expected = run.sae.codes(pre, run.sae.activation.train(pre, run.sae.threshold)[0])
    wanted = run.sae.decode(expected)
    made = run.step(x, x[:, :5]).reconstruction
    assert (made - wanted).square().sum() < 1e-3 * (wanted - run.sae.b_dec).square().sum()


def features(seed: int, n: int = 64) -> torch.Tensor:
    """Sums of a few of 40 directions and some noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(999))
    shares = torch.rand(n, 40, generator=generator)
    x = (shares * (torch.rand(n, 40, generator=generator) < 0.08)) @ directions
    x += 0.02 * torch.randn(n, D_MODEL, generator=generator)
    return x / 3


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka", "jumprelu"])
def test_five_hundred_steps_end_at_the_same_loss(arch):
    """Within 0.1 %, in single precision, which is what people train in. The bfloat16 product costs no loss either: what
    it finds is computed again exactly."""
    losses = {}
    for kernel, precision in (("dense", "fp32"), ("sparse", "fp32"), ("sparse", "bf16")):
        run = make_run(
            kernel,
            n_steps=500,
            dtype=torch.float32,
            arch=arch,
            precision=precision,
            d_sae=128,
            lr=2e-3,
            bandwidth=0.05,
            decay_start=400,
            dead_tokens=2000,
        )
        last = [run.step(features(step), features(step)).loss.item() for step in range(500)][-100:]
        losses[kernel, precision] = sum(last) / 100
    plain = losses["dense", "fp32"]
    assert losses["sparse", "fp32"] == pytest.approx(plain, rel=1e-3)
    assert losses["sparse", "bf16"] == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "jumprelu"])
def test_it_goes_on_to_the_bit_and_takes_up_what_the_dense_kernel_left(arch):
    def go(run: TrainRun, first: int, last: int) -> list[float]:
        return [run.step(rows(step), rows(step)).loss.item() for step in range(first, last)]

    whole, dense = make_run("sparse", arch=arch), make_run("dense", arch=arch)
    go(whole, 0, 10)
    go(dense, 0, 10)
    again, other = make_run("sparse", arch=arch), make_run("sparse", arch=arch)
    again.restore({name: tensor.clone() for name, tensor in whole.state().items()}, 10)
    other.restore({name: tensor.clone() for name, tensor in dense.state().items()}, 10)
    losses = go(whole, 10, 20)
    assert go(again, 10, 20) == losses
    assert go(other, 10, 20) == pytest.approx(go(dense, 10, 20), rel=1e-4)
    assert all(value.equal(again.state()[name]) for name, value in whole.state().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka", "jumprelu"])
@pytest.mark.parametrize("weight", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_weight_that_is_not_finite_shows_in_the_loss(arch, weight, precision):
    run = make_run("sparse", dtype=torch.float32, arch=arch, precision=precision)
    sparse_from_here(run)
    with torch.no_grad():
        getattr(run.sae, weight)[3:5] = torch.nan
    losses = [run.step(x, x).loss for x in (rows(0, dtype=torch.float32), rows(1, dtype=torch.float32))]
    assert not losses[1].isfinite()


def test_jumprelu_is_dense_while_many_codes_are_on_and_sparse_afterwards():
    run = make_run("sparse", arch="jumprelu", d_sae=512)
    x = rows(0)
    run.step(x, x)
    assert run.state()["kernel.density"] > 0.1
    with torch.no_grad():
        assert run.sae.threshold is not None
        run.sae.threshold.fill_(run.sae.pre_activations(x).flatten().topk(200).values[-1])
    run.step(x, x)
    assert 0 < run.state()["kernel.density"] < 0.03
    copy = make_run("sparse", arch="jumprelu", d_sae=512)
    copy.restore({name: tensor.clone() for name, tensor in run.state().items()}, run.n_done)
    with torch.enable_grad():
        assert copy.step(x, x).loss.item() == run.step(x, x).loss.item()


def test_auto_takes_the_faster_and_says_why_and_a_name_means_that_one_or_an_error():
    def job(arch: str, d_sae: int, batch_size: int = 2048, **changes) -> Job:
        config = run_config(arch, d_sae=d_sae, k=32, **changes)
        return Job(recipe=recipe_of(config), config=config, d_model=512, d_out=512, batch_size=batch_size)

    def chosen(*args, **changes) -> tuple[str, str]:
        kernel = select("auto", "cpu", job(*args, **changes))
        return kernel.name, kernel.why

    assert chosen("batchtopk", 8192)[0] == "sparse"
    assert "k / d_sae = 0.39%" in chosen("batchtopk", 8192)[1]
    assert chosen("topk", 512) == ("dense", "k / d_sae = 6.25%, and above 5.0% dense products are faster")
    assert chosen("topk", 2048, 16)[0] == "sparse"
    assert saving(job("topk", 8192, 16), "cuda") == (False, "the step is so small that dense products are faster")
    assert saving(job("topk", 8192, 4096), "cuda")[0]
    assert not saving(job("topk", 2048, 1 << 16), "cuda")[0]
    on_gpu = select("auto", "cuda", job("topk", 8192, 4096, precision="bf16"))
    if not torch.cuda.is_available():  # where triton can run it is taken
        assert on_gpu.name == "dense"
        assert "sparse takes 1.6 to 3.8 times as long" in on_gpu.why
        assert select("auto", "cuda", job("topk", 8192, 4096)).name == "sparse"
    assert chosen("standard", 8192) == ("dense", "sparse cannot: the codes of standard are not few")
    assert chosen("topk", 8192, consistency=1.0)[1] == "sparse cannot: --consistency compares whole codes"
    assert chosen("topk", 8192, penalties=("l1=0.1",))[1] == "sparse cannot: the penalty l1 looks at whole codes"
    with pytest.raises(UserError, match="--kernel sparse cannot train gated: the codes of gated are not few"):
        select("sparse", "cpu", replace(job("gated", 8192), config=run_config("gated", name="")))
    assert select("dense", "cpu", job("gated", 8192)).name == "dense"
    with pytest.raises(UserError, match="no kernel 'warp'; there are dense, sparse"):
        select("warp", "cpu")


def written_out(entries: Entries, d_sae: int) -> torch.Tensor:
    """The same codes as [batch, d_sae]."""
    f = entries.value.new_zeros(len(entries.starts), d_sae)
    return f.index_put_((entries.row, entries.latent), entries.value)


TOP: tuple[tuple[Any, Any], ...] = ((TopK, choose_topk), (BatchTopK, choose_batchtopk))
SIZES = st.sampled_from([1, 3, 8, 16, 48, 72, 96, 128, 256])


def values(n_rows: int, d_sae: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """With ties, zeros and negative numbers."""
    drawn = torch.randn(n_rows, d_sae, generator=torch.Generator().manual_seed(seed))
    return (drawn * 8).round().div(8).to(dtype)


@given(n_rows=st.integers(1, 9), d_sae=SIZES, k=st.integers(1, 12), seed=st.integers(0, 999))
@settings(deadline=None)
def test_the_codes_that_are_on_are_those_of_the_activations(n_rows, d_sae, k, seed):
    k, pre = min(k, d_sae), values(n_rows, d_sae, seed)
    for kind, choose in TOP:
        activation = kind(k)
        chosen = choose(activation, pre, None)
        expected, smallest = activation.train(pre, None)
        found = written_out(chosen.entries, d_sae)
        if isinstance(activation, TopK):  # of a tie either may be on
            torch.testing.assert_close(found.sort(1).values, expected.sort(1).values)
            assert bool((found == torch.where(found > 0, pre, 0.0)).all())
        else:
            assert found.equal(expected)
            assert smallest is not None
            assert chosen.smallest == smallest
        assert bool((chosen.entries.value > 0).all())
        assert chosen.entries.starts.equal(row_starts(chosen.entries.row, n_rows))


@given(n_rows=st.integers(1, 9), d_sae=SIZES, seed=st.integers(0, 999), scale=st.sampled_from([0.0, 0.1, 1.0]))
@settings(deadline=None)
def test_a_jumprelu_s_entries_are_all_that_is_on_or_in_a_window(n_rows, d_sae, seed, scale):
    pre, bandwidth = values(n_rows, d_sae, seed), 0.3
    threshold = scale * values(1, d_sae, seed + 1).abs().squeeze(0)
    chosen = choose_jumprelu(JumpReLU(bandwidth=bandwidth), pre, threshold, None)
    assert written_out(chosen.entries, d_sae).equal(torch.where(pre > threshold, pre, 0.0))
    found = torch.zeros_like(pre, dtype=torch.bool)
    found[chosen.entries.row, chosen.entries.latent] = True
    wanted = (pre > threshold) | ((pre - threshold).abs() < bandwidth / 2)
    assert bool((wanted <= found).all())
    assert chosen.on is not None
    assert chosen.on.sum() == (pre > threshold).sum()


@given(n_rows=st.integers(1, 9), d_sae=SIZES, k=st.integers(1, 12), seed=st.integers(0, 999))
@settings(deadline=None)
def test_the_bounds_of_groups_are_below_the_kth_largest(n_rows, d_sae, k, seed):
    k = min(k, d_sae)
    for dtype in (torch.float32, torch.bfloat16):
        pre = values(n_rows, d_sae, seed, dtype)
        groups = Groups(pre, k, positive=False)
        assert bool((row_bounds(groups, k).squeeze(1) <= pre.topk(k, dim=1).values[:, -1]).all())
        assert batch_bound(groups, k) <= pre.flatten().topk(k * n_rows).values[-1]


def test_few_more_values_reach_the_bound_than_are_wanted():
    pre = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    for k in (8, 32, 64):
        groups = Groups(pre, k)
        for bound in (row_bounds(groups, k), batch_bound(groups, k)):
            n_found = len(groups.above(bound).row)
            assert 1.0 <= n_found / (k * 256) < 1.4


def test_what_bfloat16_finds_is_what_float32_would():
    """Rounding moves values by less than the margin, so all of the largest are candidates, and exact values decide."""
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(128, 256, generator=generator), torch.randn(2048, 256, generator=generator) / 16
    pre = x @ weights.t()
    rounded = x.bfloat16() @ weights.bfloat16().t()

    def exact(row: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return pre[row, latent]

    for kind, choose in TOP:
        found, expected = (choose(kind(16), pre, None), choose(kind(16), rounded, exact))
        assert written_out(found.entries, 2048).equal(written_out(expected.entries, 2048))
    threshold = torch.full((2048,), 2.0)
    found, expected = (
        choose_jumprelu(JumpReLU(), pre, threshold, None),
        choose_jumprelu(JumpReLU(), rounded, threshold, exact),
    )
    assert written_out(found.entries, 2048).equal(written_out(expected.entries, 2048))


@given(n=st.integers(0, 40), n_sums=st.integers(1, 9), width=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None)
def test_sums_and_dots_are_those_of_the_formula(n, n_sums, width, seed):
    generator = torch.Generator().manual_seed(seed)
    table, other = (torch.randn(7, width, generator=generator, dtype=torch.float64) for _ in range(2))
    index = torch.randint(7, (n,), generator=generator)
    owner = torch.randint(n_sums, (n,), generator=generator).sort().values
    weight = torch.randn(n, generator=generator, dtype=torch.float64)
    expected = torch.zeros(n_sums, width, dtype=torch.float64).index_add_(0, owner, weight.unsqueeze(1) * table[index])
    torch.testing.assert_close(weighted_sums(table, index, weight, row_starts(owner, n_sums)), expected)
    there = torch.randint(7, (n,), generator=generator)
    torch.testing.assert_close(dots(other, there, table, index), (other[there] * table[index]).sum(1))
    torch.testing.assert_close(row_dots(table, other), (table * other).sum(1))


@given(n=st.integers(0, 60), d_sae=st.sampled_from([1, 5, 2**15, 2**15 + 1]), seed=st.integers(0, 99))
@settings(deadline=None)
def test_segments_are_the_entries_by_latent_in_their_order(n, d_sae, seed):
    latent = torch.randint(d_sae, (n,), generator=torch.Generator().manual_seed(seed))
    segments = by_latent(latent, d_sae)
    assert segments.order.equal(latent.argsort(stable=True))
    assert segments.counts.equal(torch.bincount(latent, minlength=d_sae))
    assert segments.starts.equal(torch.searchsorted(latent.sort().values, torch.arange(d_sae)))
