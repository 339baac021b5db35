"""The Triton kernel against the dense one: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before anything imports triton, and other tests may do that first. So where there is
no GPU one test runs this file in a process of its own, in which the others are not skipped.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from train_fixtures import run_config

from train.engine import Job
from train.kernels import _cost, select
from train.names import find
from train.step import TrainRun, recipe_of

ROOT = Path(__file__).parent.parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
CUDA = torch.cuda.is_available()
INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA and not INSIDE else "cpu"

in_triton = pytest.mark.skipif(
    not (HAS_TRITON and (CUDA or INSIDE)),
    reason="needs triton and a GPU, or its interpreter, where another test runs it",
)
on_gpu = pytest.mark.skipif(not (HAS_TRITON and CUDA), reason="needs triton and a GPU")
ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu")


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed; make setup installs it where it has a wheel")
@pytest.mark.skipif(CUDA or INSIDE, reason="the tests run here, no process of their own is needed")
def test_all_tests_of_this_file_pass_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Odd, so that no block is full; in the interpreter as small as all that is to be seen allows."""

    batch: int = 5
    d_model: int = 19
    d_sae: int = 33
    k: int = 2
    n_steps: int = 2


SHAPE = Shape() if DEVICE == "cpu" else Shape(batch=131, d_model=97, d_sae=1031, k=5, n_steps=12)


@pytest.fixture(autouse=True)
def sparse_enough(monkeypatch):
    """JumpReLU's few latents are on more often than pays: let it be sparse all the same."""
    monkeypatch.setattr(_cost, "MAX_DENSITY", {"cpu": 1.0, "cuda": 1.0})


@pytest.mark.parametrize(
    ("arch", "changes", "word"),
    [
        ("standard", {}, "not few"),
        ("gated", {}, "not few"),
        ("topk", {"consistency": 0.1}, "consistency"),
        ("topk", {"skip": True}, "skip"),
        ("batchtopk", {"penalties": ("l1=0.1",)}, "l1"),
        ("batchtopk", {"penalties": ("l1=0",)}, ""),
        ("jumprelu", {"penalties": ("auxk=0.1",)}, ""),
        ("matryoshka", {}, ""),
    ],
)
def test_what_it_cannot_train_it_refuses_and_says_why(arch, changes, word):
    config = run_config(arch, **changes)
    job = Job(recipe=recipe_of(config), config=config, d_model=8, d_out=8, batch_size=32)
    problem = find("kernels", "triton").refusal(job)
    assert word in problem
    assert bool(problem) == bool(word)


def test_where_it_cannot_run_it_says_what_is_missing(monkeypatch):
    module = find("kernels", "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in module.unavailable("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA" in module.unavailable("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds none" in module.unavailable("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not module.unavailable("cuda:1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not module.unavailable("cpu")
    assert "interpreter" in module.unavailable("cuda")


def batch(seed: int, width: int = SHAPE.d_model, n: int = SHAPE.batch) -> torch.Tensor:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 0.2
    return (x / x.square().sum(1).mean().sqrt()).to(DEVICE)


def make_run(kernel: str, arch: str, *, d_out: int | None = None, precision: str = "fp32", **changes) -> TrainRun:
    config = run_config(
        arch,
        **{"d_sae": SHAPE.d_sae, "k": SHAPE.k, "lr": 1e-3, "warmup_steps": 0, "bandwidth": 0.05, **changes},
        precision=precision,
    )
    run = TrainRun(config, SHAPE.d_model, 500, select(kernel, DEVICE), DEVICE, d_out=d_out)
    run.start_at(batch(0), None if d_out is None else batch(0, d_out))
    with torch.no_grad():  # nothing at zero, and no threshold where many codes are in its window
        run.sae.b_enc.copy_(0.02 * batch(1, SHAPE.d_sae, 1)[0])
        if run.sae.activation.threshold == "trained":
            assert run.sae.threshold is not None
            run.sae.threshold.copy_(0.15 + 0.1 * torch.rand(SHAPE.d_sae, generator=torch.Generator().manual_seed(5)))
            run.sae.threshold[::5] = 0.01  # within half a bandwidth of 0
    return run


def sparse(run: TrainRun) -> TrainRun:
    """A JumpReLU that does not wait for its codes to be few."""
    run._engine._is_dense = False  # pyright: ignore[reportAttributeAccessIssue]
    return run


def n_dense(run: TrainRun) -> int:
    return run._engine.n_dense  # pyright: ignore[reportAttributeAccessIssue]


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float, name: str = "") -> None:
    """Within a share of the largest."""
    difference = (one.float() - other.float()).abs().max().item()
    assert difference <= tolerance * one.float().abs().max().item() + 1e-7, (name, difference)


def compare(
    plain: TrainRun, ours: TrainRun, n_steps: int, *, d_out: int | None = None, tolerance: float = 3e-4
) -> None:
    """Losses, reconstructions, first moments (with beta1 at 0 the gradients), weights, thresholds and counters."""
    for seed in range(n_steps):
        x = batch(seed)
        target = x if d_out is None else batch(seed + 50, d_out)
        one, other = plain.step(x, target), ours.step(x, target)
        assert other.loss.item() == pytest.approx(one.loss.item(), rel=tolerance)
        close(one.reconstruction, other.reconstruction, tolerance, "reconstruction")
        assert int(one.n_active) == int(other.n_active)
        assert (one.smallest is None) == (other.smallest is None)
        if one.smallest is not None and other.smallest is not None:
            close(one.smallest, other.smallest, tolerance, "smallest")
    for (name, theirs), (_, mine) in zip(plain.sae.named_parameters(), ours.sae.named_parameters(), strict=True):
        close(theirs.detach(), mine.detach(), 10 * tolerance, name)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            close(plain.optimizer.state[theirs][key], ours.optimizer.state[mine][key], 10 * tolerance, f"{name} {key}")
    assert plain.silent_tokens.equal(ours.silent_tokens)
    assert n_dense(ours) == 0


@in_triton
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_steps_are_those_of_the_dense_kernel(arch):
    compare(make_run("dense", arch), sparse(make_run("triton", arch)), SHAPE.n_steps)


@in_triton
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_in_half_precision_codes_and_sums_are_near(arch):
    """The dense kernel in float32 is what is compared: its bfloat16 chooses among codes that it has rounded."""
    plain, ours = make_run("dense", arch), sparse(make_run("triton", arch, precision="bf16"))
    x = batch(0)
    one, other = plain.step(x, x), ours.step(x, x)
    assert int(one.n_active) == int(other.n_active)
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=0.01)
    if one.smallest is not None and other.smallest is not None:
        close(one.smallest, other.smallest, 0.01)
    close(one.reconstruction, other.reconstruction, 0.015)
    for (name, theirs), (_, mine) in zip(plain.sae.named_parameters(), ours.sae.named_parameters(), strict=True):
        close(plain.optimizer.state[theirs]["exp_avg"], ours.optimizer.state[mine]["exp_avg"], 0.03, name)
    work = ours._engine._work  # pyright: ignore[reportAttributeAccessIssue]
    close(ours.sae.W_enc.detach().t(), work.inputs.shadow, 0.005, "shadow of W_enc")  # the interpreter cuts bits off
    close(ours.sae.W_dec.detach(), work._shadow, 0.005, "shadow of W_dec")
    assert n_dense(ours) == 0


@in_triton
@pytest.mark.parametrize(("arch", "aux_k"), [("batchtopk", 0), ("topk", 3), ("jumprelu", 2)])
def test_dead_latents_learn_by_auxk(arch, aux_k):
    changes = {"dead_tokens": SHAPE.batch, "aux_k": aux_k, "penalties": ("auxk=0.5",)}
    plain, ours = make_run("dense", arch, **changes), sparse(make_run("triton", arch, **changes))
    compare(plain, ours, SHAPE.n_steps)
    assert plain.dead().any()


@in_triton
def test_a_transcoder_with_a_free_decoder_and_no_clip_is_that_of_the_dense_kernel():
    changes = {"d_out": 23, "decoder": "free", "clip_norm": 0.0}
    plain, ours = make_run("dense", "batchtopk", **changes), make_run("triton", "batchtopk", **changes)
    compare(plain, ours, SHAPE.n_steps, d_out=23)


@in_triton
def test_a_long_gradient_is_shortened_as_in_the_dense_kernel():
    plain, ours = (make_run(kernel, "topk", clip_norm=0.01, beta1=0.0) for kernel in ("dense", "triton"))
    compare(plain, ours, 1)


@in_triton
def test_what_there_is_no_room_for_is_noticed_and_found_in_the_end():
    """Slots for one candidate where a latent tile has more, and a bound that is far too high."""
    from train.kernels._triton_blocks import Sizes

    plain, ours = make_run("dense", "batchtopk"), make_run("triton", "batchtopk")
    engine = ours._engine
    most = SHAPE.batch * SHAPE.d_sae
    engine._sizes = Sizes(slots=1, candidates=most, row_candidates=1, codes=most)  # pyright: ignore
    engine._level.fill_(1e6)  # pyright: ignore[reportAttributeAccessIssue]
    engine._knows_level = True  # pyright: ignore[reportAttributeAccessIssue]
    compare(plain, ours, 1)
    assert engine.n_again > 0  # pyright: ignore[reportAttributeAccessIssue]


@in_triton
def test_a_row_that_finds_too_few_is_looked_at_again(monkeypatch):
    """With a sample that says nothing of the few large values: every first bound is too high."""
    from train.kernels import _triton_search

    monkeypatch.setattr(_triton_search, "sampled_ranks", lambda k, n: (1, n))
    plain, ours = make_run("dense", "topk"), make_run("triton", "topk")
    for run in (plain, ours):
        with torch.no_grad():
            run.sae.b_enc[:: _triton_search._EVERY] += torch.linspace(0.3, -1.0, len(run.sae.b_enc[::8])).to(DEVICE)
    compare(plain, ours, 1)


@in_triton
@pytest.mark.parametrize("arch", ["batchtopk", "topk"])
def test_codes_that_tie_are_kept_as_the_dense_kernel_keeps_them(arch):
    """All rows alike, and latents in pairs: every value is there many times."""
    plain, ours = make_run("dense", arch), make_run("triton", arch)
    for run in (plain, ours):
        with torch.no_grad():
            run.sae.b_enc.zero_()
            n = SHAPE.d_sae - SHAPE.d_sae % 2
            run.sae.W_enc[:, 1:n:2] = run.sae.W_enc[:, 0:n:2]
    x = batch(0)[:1].expand(SHAPE.batch, -1).contiguous()
    one, other = plain.step(x, x), ours.step(x, x)
    if arch == "batchtopk":
        assert int(one.n_active) == int(other.n_active)
        assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-4)
    else:  # which of two equal ones is kept is free
        assert int(one.n_active) == int(other.n_active) == SHAPE.k * SHAPE.batch


@in_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("weight", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_weight_that_is_not_finite_shows_in_the_loss_and_nothing_raises(weight):
    run = make_run("triton", "batchtopk")
    with torch.no_grad():
        getattr(run.sae, weight)[3:5] = torch.nan
    assert not run.step(batch(0), batch(0)).loss.isfinite()
    run.step(batch(1), batch(1))


@in_triton
def test_a_checkpoint_is_taken_up_to_the_bit_and_by_the_dense_kernel():
    whole = make_run("triton", "matryoshka")
    for seed in range(2):
        whole.step(batch(seed), batch(seed))
    checkpoint = load(save({key: tensor.detach().contiguous() for key, tensor in whole.state().items()}))
    resumed, dense = make_run("triton", "matryoshka"), make_run("dense", "matryoshka")
    for run in (resumed, dense):
        run.restore(checkpoint, 2)
    losses = [run.step(batch(2), batch(2)).loss.item() for run in (whole, resumed, dense)]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-4)
    ours, theirs = whole.state(), resumed.state()
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)


@in_triton
def test_a_jumprelu_whose_codes_are_many_is_trained_by_the_dense_kernel(monkeypatch):
    monkeypatch.setattr(_cost, "MAX_DENSITY", {"cpu": 1e-3, "cuda": 1e-3})
    run = make_run("triton", "jumprelu")
    run.step(batch(0), batch(0))
    assert n_dense(run) == 1


def directions_and_noise(seed: int) -> torch.Tensor:
    """[1024, 128]: rows of few directions out of 300, so that there is something to learn."""
    directions = torch.randn(300, 128, generator=torch.Generator().manual_seed(1))
    random = torch.Generator().manual_seed(seed)
    codes = (torch.rand(1024, 300, generator=random) < 0.03) * torch.rand(1024, 300, generator=random)
    x = codes @ directions + 0.05 * torch.randn(1024, 128, generator=random)
    return (x / x.square().sum(1).mean().sqrt()).to(DEVICE)


def loss_after_500_steps(kernel: str, batches: list[torch.Tensor], arch: str, moved: float = 0.0, **changes) -> float:
    """The mean of the last 25, from weights that are `moved` by a share."""
    how = {"d_sae": 2048, "k": 16, "lr": 1e-3, "warmup_steps": 50, "decay_start": 400, "dead_tokens": 20 * 1024}
    run = TrainRun(run_config(arch, **how, **changes), 128, 500, select(kernel, DEVICE), DEVICE)
    run.start_at(batches[0])
    with torch.no_grad():
        run.sae.W_enc.mul_(1 + moved)
    losses = [run.step(batches[step % 25], batches[step % 25]).loss for step in range(500)]
    if kernel == "triton":
        assert n_dense(run) < 30
    return torch.stack(losses[-25:]).mean().item()


@on_gpu
@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka"])
def test_after_500_steps_the_loss_is_that_of_the_dense_kernel(arch):
    """In half precision too: sums in float32 are nearer to the dense kernel in float32 than that one's own bfloat16."""
    batches = [directions_and_noise(seed) for seed in range(25)]
    wanted = loss_after_500_steps("dense", batches, arch)
    for precision in ("fp32", "bf16"):
        assert loss_after_500_steps("triton", batches, arch, precision=precision) == pytest.approx(wanted, rel=1e-3)


@on_gpu
def test_after_500_steps_a_jumprelu_is_as_near_to_the_dense_kernel_as_that_to_itself():
    """A code that crosses its threshold is there or not, so a last digit decides: weights a millionth away show it."""
    batches = [directions_and_noise(seed) for seed in range(25)]
    plain, ours = (loss_after_500_steps(kernel, batches, "jumprelu") for kernel in ("dense", "triton"))
    spread = [abs(loss_after_500_steps("dense", batches, "jumprelu", moved) - plain) for moved in (1e-6, -1e-6, 2e-6)]
    assert abs(ours - plain) < 3 * max(spread) + 1e-3 * plain
