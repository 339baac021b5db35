"""What ranks exchange to train one SAE, each piece against its plain form; and what is refused before they start."""

import json
from dataclasses import replace

import pytest
import torch
from parallel_fixtures import PARALLEL, logs, ranks
from safetensors.torch import load, save
from train_fixtures import DATA, make_training_cache, run_config

from cache_spec import UserError
from cache_spec.seeds import derive_seed
from train.activations import _keep_anywhere, _keep_spread, kth_largest
from train.annealing import Annealing
from train.choosing import kernel_of
from train.engine import Kernel
from train.kernels import dense
from train.loader import MixedBatchLoader
from train.parallel import shards
from train.parallel.agree import check_copies, led
from train.parallel.axis import ALONE, Axis, Spread
from train.parallel.exchange import largest_in_rows, nth_largest
from train.parallel.limits import least_memory, refuse_spread
from train.parallel.shards import read_share, sharded_dim, write_tensors
from train.passes import needed_bytes, split
from train.ranks import read_parallel
from train.sae import SparseAutoencoder, initialise
from train.step import TrainRun, new_sae, recipe_of
from train.sweep import train_sweep
from train.watch import Rank

N = 3


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exchange(team):
    """Each rank's part of the same tensors, through what the ranks do together."""
    axis = team.spread.latents
    for seed, n in ((1, 1), (2, 7), (3, 60), (4, 120)):
        values = numbers(seed, 8, 15)
        values[values.abs() < 0.3] = 0.0  # ties
        if seed == 3:
            values[0, :12] = torch.inf
        own = values[:, axis.share(15)]
        assert nth_largest(own, n, axis, kth_largest) == values.flatten().sort(descending=True).values[n - 1]
    uneven = [0, 4, 9]  # columns before each rank's; the first has 4, the last 11
    values = numbers(5, 6, 20)
    own = values[:, uneven[axis.index] : [*uneven, 20][axis.index + 1]]
    for n in (1, 5, 12):
        largest, columns = largest_in_rows(own, n, axis)
        made = torch.zeros_like(own).scatter(-1, columns, largest)
        whole = torch.zeros_like(values).scatter(-1, values.topk(n).indices, values.topk(n).values)
        assert made.equal(whole[:, uneven[axis.index] : [*uneven, 20][axis.index + 1]])
    values = numbers(6, 6, 600).relu()
    own = values[:, axis.share(600)]
    largest, columns = largest_in_rows(own, 60, axis)
    assert largest.shape[1] < 60  # not all n of each process are sent
    kept = values * (values >= values.topk(60).values[:, -1:])
    assert torch.zeros_like(own).scatter(-1, columns, largest).equal(kept[:, axis.share(600)])
    part = torch.tensor([1.0 + axis.index], requires_grad=True)
    axis.total(part).square().sum().backward()
    assert part.grad is not None
    assert part.grad.item() == 12  # of (1 + 2 + 3) ** 2
    assert axis.mean(part).item() == 2
    assert axis.count(axis.index, part) == 3
    assert axis.any(torch.tensor([axis.index == 1, False])).tolist() == [True, False]
    assert axis.gather(part.detach()).flatten().tolist() == [1, 2, 3]
    assert least_memory(team.spread, None) is None
    assert least_memory(team.spread, 10 + axis.index) == 10
    assert led(team.spread, lambda: {"who": axis.index}) == {"who": 0}
    with pytest.raises(UserError, match="no room"):
        led(team.spread, fail)


def part_ways(team):
    """A weight that a fault changed on one rank is found by all."""
    weights = [torch.ones(4), torch.zeros(3)]
    check_copies(team.spread, weights, "go on")
    if team.rank.index == 2:
        weights[1][0] = 1e-30
    with pytest.raises(UserError, match=r"rank 2 are no longer those of rank 0.*; take .* and go on"):
        check_copies(team.spread, weights, "go on")


def keep(team):
    """The k largest of a batch and the smallest of them, also where fewer than k are positive, and where none is."""
    axis = team.spread.all
    for values, n in ((numbers(6, 6, 9), 20), (numbers(6, 6, 9) - 1, 40), (numbers(6, 6, 9) - 9, 20)):
        codes, smallest = _keep_anywhere(values, n)
        for spread, part in (
            (Spread(rows=axis, all=axis), (axis.share(6), slice(None))),
            (Spread(latents=axis, all=axis), (slice(None), axis.share(9))),
        ):
            own, found = _keep_spread(values[part], n, spread)
            assert own.equal(codes[part])
            assert found == smallest


def begin(team):
    """All start at the first rank's b_dec, though a machine may round it otherwise: here it is quite another."""
    for spread in (Spread(rows=team.spread.all), Spread(latents=team.spread.all)):
        x = [numbers(7, 20, 5) + index for index in (0, team.rank.index)]
        run, first = (
            TrainRun(run_config("topk", d_sae=48), 5, 10, Kernel("dense", dense.engine), spread=each)
            for each in (spread, ALONE)
        )
        run.start_at(x[1])
        first.start_at(x[0])
        assert run.sae.b_dec.equal(first.sae.b_dec)


def anneal(team):
    """Ranks see their part of the codes, of rows or of latents, and move the coefficient as one does that sees all."""
    how = {"start": 2, "n_steps": 30, "p_end": 0.2, "n_updates": 6, "n_queue": 4, "dtype": torch.float32}
    axis = team.spread.all
    for spread, part in (
        (Spread(rows=axis, all=axis), lambda codes: codes[axis.share(len(codes))]),
        (Spread(latents=axis, all=axis), lambda codes: codes[:, axis.share(codes.shape[1])]),
    ):
        alone, spread_out = Annealing(**how, device="cpu"), Annealing(**how, device="cpu")
        for step in range(30):
            codes = numbers(step, 6, 9).relu() * torch.linspace(0.1, 3, 54).reshape(6, 9)  # unlike on each rank
            alone.observe(codes, step)
            spread_out.observe(part(codes), step, spread)
        assert abs(alone.rescale - 1) > 0.1
        for name, tensor in alone.state().items():
            torch.testing.assert_close(spread_out.state()[name], tensor)


def fail() -> None:
    raise UserError("no room")


def files(team, path):
    """A run's state goes to a file that one process could have written, and each rank gets its part back."""
    axis, config = team.spread.latents, run_config("matryoshka", d_sae=48, skip=True)
    run = TrainRun(config, 5, 10, Kernel("dense", dense.engine), d_out=7, spread=team.spread)
    x, target = numbers(1, 6, 5), numbers(2, 6, 7)
    run.step(x, target)
    shards.BLOCK_BYTES = 100
    state = run.state()
    n_bytes, checksum = write_tensors(path, state, axis, "make room")
    back = read_share(path, axis) if axis.index == 0 else None
    team.gather("written")
    back = back or read_share(path, axis)
    assert back.keys() == state.keys()
    assert all(back[name].equal(tensor) for name, tensor in state.items())
    if axis.index == 0:
        data = path.read_bytes()
        assert save(load(data)) == data
        assert n_bytes == len(data)
        assert checksum == f"{shards.crc32c(data):08x}"
        shapes = {name: list(tensor.shape) for name, tensor in load(data).items()}
        assert shapes["sae.W_enc"] == shapes["adam.W_enc.exp_avg"] == [5, 48]
        assert shapes["sae.W_dec"] == [48, 7]
        assert shapes["silent_tokens"] == [48]


def all_of_it(team, path):
    exchange(team)
    keep(team)
    begin(team)
    anneal(team)
    part_ways(team)
    files(team, path)


def test_what_ranks_exchange_is_what_one_finds_and_what_they_write_is_the_file_of_one(tmp_path):
    """One test for both, because it takes seconds to start ranks."""
    assert ranks(all_of_it, N, "latents", tmp_path, tmp_path / "state.safetensors") == [0] * N, logs(tmp_path)


def test_alone_a_tensor_comes_back_as_it_went_in():
    axis, tensor = ALONE.latents, numbers(1, 4, 4)
    assert axis.total(tensor) is axis.mean(tensor) is axis.least(tensor) is axis.any(tensor) is tensor
    assert tensor[axis.share(4)].equal(tensor)
    assert axis.count(3, tensor) == 3
    assert nth_largest(tensor, 2, axis, kth_largest) == kth_largest(tensor, 2)
    assert str(ALONE) == "alone"
    assert read_parallel("latents", Rank(host="a", pid=7)) == ""


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("arch", ["topk", "standard", "jumprelu", "gated"])
def test_a_share_of_the_latents_starts_as_that_part_of_the_whole(arch, n):
    recipe, parts = recipe_of(run_config(arch, d_sae=64)), []
    whole = new_sae(recipe, 8, 64, 3)
    for index in range(n):
        parts.append(new_sae(recipe, 8, 64, 3, spread=Spread(latents=Axis(n, index))))
        assert parts[-1].d_sae == 64
    for name, tensor in whole.state_dict().items():
        dim = sharded_dim(f"sae.{name}", tensor.dim())
        made = [part.state_dict()[name] for part in parts]
        assert (made[0] if dim is None else torch.cat(made, dim)).equal(tensor)


@pytest.mark.parametrize("entries", ["normal", "uniform"])
def test_many_latents_start_as_if_they_had_been_drawn_at_once(entries):
    """They are drawn 8,192 at a time."""
    sae = SparseAutoencoder(3, 20_011, recipe_of(run_config("topk")).activation)
    initialise(sae, 1, entries=entries, norm=0.5)
    generator = torch.Generator().manual_seed(derive_seed("train/init", 1))
    rows = torch.empty(20_011, 3)
    rows = rows.normal_(generator=generator) if entries == "normal" else rows.uniform_(-1, 1, generator=generator)
    assert sae.W_dec.equal(rows * (0.5 / rows.norm(dim=1, keepdim=True)))
    assert sae.W_enc.equal(sae.W_dec.t())


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    return MixedBatchLoader(make_training_cache(tmp_path_factory.mktemp("parts") / "cache"), DATA)


@pytest.mark.parametrize(
    ("spread", "changes", "words"),
    [
        (Spread(rows=Axis(3)), {}, "--batch-size 32 cannot be shared equally by 3 processes; give a multiple of 3"),
        (Spread(latents=Axis(5)), {}, "--d-sae 32 cannot be shared equally by 5 processes; give a multiple of 5"),
        (Spread(rows=Axis(2)), {"arch": "standard", "resample_every": 5}, "--resample-every .* --parallel sweep"),
    ],
)
def test_what_cannot_be_spread_is_refused(spread, changes, words, loader):
    configs = [replace(run_config(), **changes)]
    refuse_spread(configs, loader, ALONE)
    with pytest.raises(UserError, match=words):
        refuse_spread(configs, loader, spread)


def test_a_kernel_that_cannot_be_spread_is_refused_and_auto_says_which_can(loader):
    spread = Spread(latents=Axis(2))
    with pytest.raises(UserError, match=r"--kernel sparse trains an SAE on one process; .*--kernel dense"):
        kernel_of(run_config(), loader, "sparse", spread)
    chosen = kernel_of(run_config(), loader, "auto", spread)
    assert (chosen.name, chosen.why) == ("dense", "the one that can be spread over processes")
    assert kernel_of(run_config(), loader, "dense", spread).why == ""


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_share_needs_less_memory_than_the_whole(parallel, loader):
    wide = run_config(d_sae=65_536)
    spread = Spread(rows=Axis(4)) if parallel == "data" else Spread(latents=Axis(4))
    whole, share = (needed_bytes([wide], loader, 1, "dense", each) for each in (ALONE, spread))
    assert whole / 4 < share < whole
    assert split([wide], loader, 1, share, "dense", spread) == [[wide]]
    with pytest.raises(UserError, match="alone needs"):
        split([wide], loader, 1, share, "dense")


def test_a_run_that_one_process_trains_says_nothing_of_ranks(loader, tmp_path):
    train_sweep(loader, [run_config("topk")], out=tmp_path)
    assert "spread" not in json.loads((tmp_path / "topk" / "run.json").read_text())
