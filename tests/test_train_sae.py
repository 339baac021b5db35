"""The SAE, its activations and its kernel: each fast way against the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_spec import UserError
from train.activations import (
    BatchTopK,
    JumpReLU,
    ReLU,
    Threshold,
    TopK,
    _keep_anywhere,
    _keep_on_cpu,
    kth_largest,
)
from train.kernels import dense
from train.names import available, find
from train.sae import UNSET, SparseAutoencoder, geometric_median, initialise

D_MODEL, D_SAE = 6, 20


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(activation, prefixes=(), seed: int = 0, dtype=torch.float64, **how) -> SparseAutoencoder:
    """An SAE with nothing at zero."""
    sae = SparseAutoencoder(D_MODEL, D_SAE, activation, prefixes, dtype=dtype, **how)
    initialise(sae, seed, entries="uniform", norm=1.0, threshold=0.1)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1, generator=generator(1))
        sae.b_dec.normal_(std=0.1, generator=generator(2))
    return sae


def rows(n: int = 16, seed: int = 3, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=generator(seed), dtype=dtype)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 96)),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normal", "ties", "columns", "nan"]),
)
def test_the_kth_largest_is_the_one_that_sorting_finds(shape, share, seed, kind):
    values = torch.randn(shape, generator=generator(seed))
    if kind == "ties":
        values = values.round()
    if kind == "columns":  # a few columns hold all the large ones
        values += 10 * (torch.arange(shape[1]) % 17 == 0)
    if kind == "nan":  # which sorting takes for the largest
        values[torch.rand(shape, generator=generator(seed + 1)) < 0.1] = torch.nan
    n = 1 + int(share * (values.numel() - 1))
    found = kth_largest(values, n)
    wanted = values.flatten().sort(descending=True).values[n - 1]
    assert found == wanted or (found.isnan() and wanted.isnan())


def test_batchtopk_keeps_the_largest_of_the_batch_and_tells_the_smallest_of_them():
    pre = torch.randn(64, 256, generator=generator())
    f, smallest = BatchTopK(5).train(pre, None)
    assert int((f > 0).sum()) == 5 * 64
    assert f[f > 0].min() == smallest
    assert pre[f == 0].max() < smallest
    assert f[f > 0].equal(pre[f > 0])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 64)),
    share=st.floats(0, 1),
    mean=st.sampled_from([-3.0, -1.0, 0.0, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_the_way_of_the_cpu_keeps_what_the_way_of_any_device_keeps(shape, share, mean, seed):
    """Values, gradients and the smallest value kept."""
    start = torch.randn(shape, generator=generator(seed)) + mean
    n_kept = 1 + int(share * (start.numel() - 1))
    weight = torch.randn(shape, generator=generator(seed + 1))
    found = []
    for keep in (_keep_on_cpu, _keep_anywhere):
        pre = start.clone().requires_grad_()
        f, smallest = keep(pre, n_kept)
        (f * weight).sum().backward()
        assert pre.grad is not None
        found.append((f.detach(), smallest.detach(), pre.grad))
    for one, other in zip(*found, strict=True):
        assert one.equal(other)


def test_batchtopk_with_fewer_positive_values_than_wanted_keeps_those():
    pre = -torch.rand(8, 16, generator=generator())
    pre[0, :3] = torch.tensor([3.0, 1.0, 2.0])
    f, smallest = BatchTopK(4).train(pre, None)
    assert f.equal(torch.relu(pre))
    assert smallest == 1.0
    f, smallest = BatchTopK(4).train(-torch.rand(8, 16, generator=generator()), None)
    assert not f.any()
    assert smallest.isinf()


def test_topk_keeps_k_of_each_row_and_never_a_negative_one():
    pre = torch.randn(10, 12, generator=generator()) - 1
    f = TopK(4).infer(pre, None)
    for row, codes in zip(pre, f, strict=True):
        wanted = torch.zeros(12)
        for i in row.argsort(descending=True)[:4]:
            wanted[i] = max(row[i], torch.tensor(0.0))
        assert codes.equal(wanted)


@pytest.mark.parametrize("activation", [ReLU(), TopK(3), BatchTopK(3), JumpReLU(), Threshold()])
def test_in_use_no_row_depends_on_another(activation):
    sae = made(activation)
    if sae.threshold is not None:
        sae.threshold.data.fill_(0.4)
    x = rows()
    torch.testing.assert_close(sae.encode(x), torch.cat([sae.encode(row[None]) for row in x]))
    assert (sae.encode(x) >= 0).all()
    assert 0 < (sae.encode(x) > 0).double().mean() < 1


@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize("chosen", [None, torch.tensor([4, 0, 19])])
def test_pre_activations_and_all_their_gradients_are_those_of_the_formula(subtract_b_dec, chosen):
    sae, x = made(ReLU(), subtract_b_dec=subtract_b_dec), rows()
    weight = torch.randn(16, D_SAE if chosen is None else 3, generator=generator(9), dtype=torch.float64)
    (sae.pre_activations(x, chosen) * weight).sum().backward()
    plain = made(ReLU(), subtract_b_dec=subtract_b_dec)
    pre = (x - plain.b_dec if subtract_b_dec else x) @ plain.W_enc + plain.b_enc
    pre = pre if chosen is None else pre[:, chosen]
    torch.testing.assert_close(sae.pre_activations(x, chosen), pre)
    (pre * weight).sum().backward()
    for name in ("W_enc", "b_enc") + (("b_dec",) if subtract_b_dec else ()):
        torch.testing.assert_close(getattr(sae, name).grad, getattr(plain, name).grad, msg=name)


def test_prefixes_reconstruct_with_their_latents_alone():
    sae = made(ReLU(), prefixes=(2, 7, D_SAE))
    f = sae.encode(rows())
    for end, reconstruction in zip((2, 7, D_SAE), sae.decode_prefixes(f), strict=True):
        cut = torch.where(torch.arange(D_SAE) < end, f, 0)
        torch.testing.assert_close(reconstruction, sae.decode(cut))


def test_rows_may_have_any_leading_shape():
    sae, x = made(TopK(3)), rows(12)
    torch.testing.assert_close(sae(x.view(3, 4, D_MODEL)).view(12, D_MODEL), sae(x))


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3), JumpReLU(), ReLU()])
def test_another_threshold_makes_another_sae_with_the_same_weights(activation):
    sae, x = made(activation), rows()
    before = sae.encode(x)
    other = sae.with_threshold(0.25)
    pre = sae.pre_activations(x)
    assert other.encode(x).equal(torch.where(pre > 0.25, pre, 0.0))
    assert other.W_enc is sae.W_enc
    assert sae.encode(x).equal(before)
    assert sae.activation == activation
    assert other.with_threshold(torch.full((D_SAE,), 9.0)).encode(x).count_nonzero() == 0


def test_the_seed_alone_decides_where_an_sae_starts():
    one, same, another = (made(ReLU(), seed=seed) for seed in (0, 0, 1))
    assert one.W_enc.equal(same.W_enc)
    assert not one.W_enc.equal(another.W_enc)
    torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))
    assert one.W_enc.equal(one.W_dec.t())


def test_what_becomes_of_a_threshold():
    assert made(ReLU()).threshold is None
    assert made(TopK(3)).threshold is None
    assert made(BatchTopK(3)).threshold == UNSET
    trained = made(JumpReLU()).threshold
    assert trained is not None
    assert trained.requires_grad
    assert trained.shape == (D_SAE,)


def test_the_geometric_median_has_the_least_sum_of_distances():
    points = rows(40)
    points[:5] += 100  # the mean would run after these
    median = geometric_median(points, tolerance=1e-12)

    def total(point: torch.Tensor) -> float:
        return (points - point).norm(dim=1).sum().item()

    for step in torch.randn(30, D_MODEL, generator=generator(5), dtype=torch.float64):
        assert total(median) <= total(median + 0.05 * step)
    assert geometric_median(torch.ones(4, 3)).isfinite().all()


@pytest.mark.parametrize("activation", [ReLU(), TopK(3), BatchTopK(3), JumpReLU(bandwidth=0.5)])
@pytest.mark.parametrize("prefixes", [(D_SAE,), (3, D_SAE)])
def test_the_dense_kernel_gives_the_values_and_gradients_of_the_formula(activation, prefixes):
    """JumpReLU's own gradient is compared in test_train_formulas; here its weights' gradients."""
    ours, plain, x = made(activation, prefixes), made(activation, prefixes), rows(32)
    forward = dense.forward(ours, x)
    pre = (x - plain.b_dec) @ plain.W_enc + plain.b_enc
    keep = (forward.f > 0).double()  # which are kept is compared with sorting above
    f = pre * keep
    torch.testing.assert_close(forward.f, f)
    errors = [(x - (f[:, :end] @ plain.W_dec[:end] + plain.b_dec)).square().sum() for end in prefixes]
    torch.stack(errors).sum().backward()
    torch.stack([(x - r).square().sum() for r in forward.reconstructions]).sum().backward()
    for weight in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(ours, weight).grad, getattr(plain, weight).grad, msg=weight)


@pytest.mark.parametrize("folder", ["architectures", "penalties", "corruptions", "kernels"])
def test_a_file_defines_its_name_and_an_unknown_name_lists_the_files(folder):
    for name in available(folder):
        assert callable(getattr(find(folder, name), "engine" if folder == "kernels" else name))
    with pytest.raises(UserError, match=", ".join(available(folder))):
        find(folder, "nothing")
    with pytest.raises(UserError):
        find(folder, "_select")
