"""``streamed_sums``: the same sums and gradients as in one piece, in the memory of one piece."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from cases import laid_out, make_logits, make_values
from torch.autograd import gradcheck, gradgradcheck

import dicekernels
from bench.measure import profiled_memory
from dicekernels import streamed
from dicekernels.streamed import streamed_sums, sums_by_label, voxel_sums
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

SHAPE = (2, 3, 5, 6, 7)  # 210 voxels: 27 pieces of 8, the last of 2


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(streamed, "CPU_PIECE_ELEMENTS", 1)
    monkeypatch.setattr(streamed, "RUN_VOXELS", 8)


def squares(z, g, m):
    """(B, C, 2): sum m g z^2 and sum exp(z)."""
    g = g.to(z.dtype)
    weighted = g * z * z if m is None else m * g * z * z
    return torch.stack([weighted.sum(2, dtype=torch.float64), z.exp().sum(2, dtype=torch.float64)], 2)


def plain_squares(z, g, m):
    g = g.to(z.dtype)
    weighted = g * z * z if m is None else m * g * z * z
    return torch.stack([weighted.flatten(2).sum(2), z.exp().flatten(2).sum(2)], 2)


def problem(dtype=torch.float64, shape=SHAPE):
    z, g = make_logits(shape, dtype), make_values((shape[0], 1, *shape[2:]), torch.float64)
    return z, g, make_values((1, 1, *shape[2:]), torch.float64, seed=5)


def test_by_hand():
    # sum m g z^2 = 2*1*1 + 0 + 1*3*4, sum e^z = e + 1 + e^-2 of the only channel.
    z = torch.tensor([[[1.0, 0.0, -2.0]]], dtype=torch.float64, requires_grad=True)
    g, m = torch.tensor([[[1.0, 5.0, 3.0]]]), torch.tensor([[[2.0, 1.0, 1.0]]])
    sums = streamed_sums(squares, z, g, m)
    assert sums.shape == (1, 1, 2)
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    assert sums[0, 0, 0] == 14
    torch.testing.assert_close(sums[0, 0, 1], e + 1 + e**-2, rtol=1e-15, atol=0)
    (gradient,) = torch.autograd.grad(sums[0, 0, 0], z)
    assert gradient.tolist() == [[[4.0, 0.0, -12.0]]]


def test_pieces_cover_the_space_once_and_in_order(small_pieces):
    seen = []

    def terms(z, index):
        seen.append(index[0, 0])
        return (z * index).sum(2, dtype=torch.float64)

    z = torch.ones(SHAPE, requires_grad=True)
    index = torch.arange(210).view(1, 1, 5, 6, 7)
    sums = streamed_sums(terms, z, index)
    assert len(seen) == 27
    assert torch.equal(torch.cat(seen), torch.arange(210))
    assert torch.equal(sums, torch.full((2, 3), 210 * 209 / 2, dtype=torch.float64))
    sums.sum().backward()
    assert torch.equal(torch.cat(seen[27:]), torch.arange(210))
    assert torch.equal(z.grad, index.expand(SHAPE).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients(small_pieces, dtype, weighted):
    z, g, m = problem(dtype)
    m = m if weighted else None
    cotangent = torch.rand(2, 3, 2, dtype=torch.float64)

    def run(function, z):
        leaf = z.detach().requires_grad_()
        sums = function(leaf)
        return sums, torch.autograd.grad((sums * cotangent).sum(), leaf)[0]

    ours, gradient = run(lambda x: streamed_sums(squares, x, g, m), z)
    truth, truth_gradient = run(lambda x: plain_squares(x, g, m), z.double())
    single = torch.float64 if dtype == torch.float64 else torch.float32
    honest, honest_gradient = run(
        lambda x: plain_squares(x, g.to(single), None if m is None else m.to(single)), z.to(single)
    )
    assert ours.dtype == torch.float64
    assert gradient.dtype == dtype
    assert_close_to_truth(ours, truth, honest, single, "sums")
    assert_gradient_close(gradient, truth_gradient, honest_gradient.to(dtype), dtype, "gradient")


def test_loss_scale_is_applied_before_the_cast():
    # 1e-9 underflows float16; times a GradScaler's 65536 it does not.
    z = torch.ones(1, 1, 4, dtype=torch.float16, requires_grad=True)
    sums = streamed_sums(lambda z: 1e-9 * z.sum(2, dtype=torch.float64), z)
    (gradient,) = torch.autograd.grad(sums.sum(), z, torch.tensor(65536.0, dtype=torch.float64))
    assert torch.equal(gradient, torch.full_like(z, 65536e-9))


@pytest.mark.parametrize("layout", ["channels_last_3d", "class_slice", "batch_strided", "permuted", "crop"])
def test_layouts_have_the_same_bits(small_pieces, layout):
    z, g, m = problem(torch.float32)

    def run(x):
        leaf = x.detach().requires_grad_()
        sums = streamed_sums(squares, leaf, g, m)
        return sums, *torch.autograd.grad(sums.sum(), leaf)

    (sums, gradient), (other_sums, other_gradient) = run(z), run(laid_out(z, layout))
    assert torch.equal(sums, other_sums)
    assert torch.equal(gradient, other_gradient)


def test_gradients_of_both_orders(small_pieces):
    z, g, m = problem(shape=(2, 2, 3, 4))
    z.requires_grad_()
    assert gradcheck(lambda z: streamed_sums(squares, z, g, m), z)
    assert gradgradcheck(lambda z: streamed_sums(squares, z, g, m), z)


def test_other_tensors_get_their_gradient(small_pieces):
    z, g, m = (x.requires_grad_() for x in problem(shape=(2, 2, 3, 4)))
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *x: streamed_sums(squares, *x), (z, g, m))
    scaled = streamed_sums(
        lambda z: factor * z.sum(2, dtype=torch.float64), z.detach(), closed_over=(factor,)
    )
    (gradient,) = torch.autograd.grad(scaled.sum(), factor)
    torch.testing.assert_close(gradient, z.detach().sum(), rtol=1e-14, atol=0)


def test_terms_that_do_not_need_the_logits():
    z = torch.randn(1, 2, 5, requires_grad=True)
    sums = streamed_sums(lambda z: torch.cat([z.sum(2), torch.ones_like(z).sum(2)], 1).double(), z)
    (gradient,) = torch.autograd.grad(sums[0, 3], z)
    assert torch.equal(gradient, torch.zeros_like(z))


def test_no_gradient_asked_for_none_made():
    z, g, m = problem()
    assert not streamed_sums(squares, z, g, m).requires_grad
    with torch.no_grad():
        assert not streamed_sums(squares, z.clone().requires_grad_(), g, m).requires_grad


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 2, 0, 3), (2, 2)])
def test_empty_and_without_space(shape):
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    sums = streamed_sums(lambda z: z.sum(2, dtype=torch.float64), z)
    truth = z if len(shape) == 2 else z.flatten(2).sum(2)
    assert torch.equal(sums, truth)
    (gradient,) = torch.autograd.grad(sums.sum(), z)
    assert torch.equal(gradient, torch.ones_like(z))


def test_targets_of_inference_mode():
    z = torch.randn(1, 2, 6, requires_grad=True)
    with torch.inference_mode():
        g = torch.rand(1, 1, 6)
    sums = streamed_sums(lambda z, g: (z * g).sum(2, dtype=torch.float64), z, g)
    (gradient,) = torch.autograd.grad(sums.sum(), z)
    assert torch.equal(gradient, g.expand(1, 2, 6))


def test_what_changes_before_backward_is_an_error():
    z, g = torch.randn(1, 2, 6, requires_grad=True), torch.rand(1, 1, 6)
    sums = streamed_sums(lambda z, g: (z * g).sum(2, dtype=torch.float64), z, g)
    g.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sums.sum().backward()


def test_functional_gradient_and_refused_vmap(small_pieces):
    z, g, m = problem()
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(streamed_sums(squares, leaf, g, m).sum(), leaf)
    gradient = torch.func.grad(lambda x: streamed_sums(squares, x, g, m).sum())(z)
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=0)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: streamed_sums(squares, x, g, m))(z[None])


def test_same_bits_on_any_number_of_threads():
    z, g, m = problem(torch.float32, (2, 3, 40, 40, 40))
    seen = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            leaf = z.clone().requires_grad_()
            sums = streamed_sums(
                lambda z, g, m: torch.stack([voxel_sums(m * g * z * z), voxel_sums(z.exp())], 2),
                leaf,
                g.float(),
                m.float(),
            )
            seen.append((sums, *torch.autograd.grad(sums.sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_compiled_in_one_graph():
    z, g, m = problem()

    def loss(z, g, m):
        return streamed_sums(squares, z, g, m).sum()

    torch.compiler.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")):
        leaf = z.clone().requires_grad_()
        value = function(leaf, g, m)
        results.append((value, *torch.autograd.grad(value, leaf)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)


def test_memory_is_the_gradient_and_one_piece():
    z = torch.randn(1, 4, 96, 96, 96)  # 27 pieces
    g, size = torch.randint(4, (1, 1, 96, 96, 96), dtype=torch.uint8), z.numel() * 4
    piece = 4 * streamed.CPU_PIECE_ELEMENTS / size
    for x in (z, z.to(memory_format=torch.channels_last_3d)):
        x = x.requires_grad_()

        def forward(x=x):
            return streamed_sums(lambda z, g: (z.exp() * g).sum(2, dtype=torch.float64), x, g).sum()

        memory = profiled_memory(forward, lambda value, x=x: torch.autograd.grad(value, x))
        assert memory.kept / size < 0.001
        assert memory.forward_peak / size < 6 * piece
        assert 1 <= memory.backward_peak / size < 1 + 6 * piece


@pytest.mark.parametrize("voxels", [0, 1, 7, 8, 9, 1023, 1024, 1025, 5000])
def test_voxel_sums_and_sums_by_label(voxels):
    generator = torch.Generator().manual_seed(voxels)
    x = torch.rand(2, 3, voxels, generator=generator)
    truth = x.double().sum(2)
    assert_close_to_truth(voxel_sums(x), truth, x.sum(2), torch.float32, "voxel_sums")
    labels = torch.randint(4, (2, 1, voxels), generator=generator)
    by_label = torch.stack([(x[:, :1].double() * (labels == k)).sum((1, 2)) for k in range(4)], 1)
    assert_close_to_truth(sums_by_label(x[:, :1], labels, 4), by_label, by_label, torch.float64, "labels")


LOSSES = {
    "wasserstein": lambda: dicekernels.GeneralizedWassersteinDiceLoss([[0.0, 1.0], [1.0, 0.0]], "GDL"),
    "unified_focal": lambda: dicekernels.AsymmetricUnifiedFocalLoss(to_onehot_y=True),
}


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning"
)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_traced_exported_and_checkpointed(name):
    loss = LOSSES[name]()
    p, y = make_values(SHAPE)[:, :2], torch.randint(2, (2, 1, 5, 6, 7), generator=torch.Generator())
    other = 0.5 * p
    truth = loss(other.double(), y).double()
    traced = torch.jit.trace(loss, (p, y))
    exported = torch.export.export(loss, (p, y)).module()
    for function in (traced, exported):
        assert_close_to_truth(function(other, y), truth, loss(other, y), torch.float32, name)
    leaf = p.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, y), leaf)
    torch.utils.checkpoint.checkpoint(loss, leaf, y, use_reentrant=False).backward()
    assert torch.equal(leaf.grad, expected)
    loss(leaf, y).backward()
    assert torch.equal(leaf.grad, 2 * expected)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_under_autocast_are_those_of_float32(name):
    loss = LOSSES[name]()
    p = make_values(SHAPE)[:, :2].bfloat16().requires_grad_()
    y = torch.randint(2, (2, 1, 5, 6, 7), generator=torch.Generator())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(p, y)
    single = p.detach().float().requires_grad_()
    expected = loss(single, y)
    assert torch.equal(value, expected)
    (gradient,), (exact,) = torch.autograd.grad(value, p), torch.autograd.grad(expected, single)
    assert torch.equal(gradient, exact.bfloat16())


def test_explain_and_a_forced_backend():
    loss = dicekernels.GeneralizedWassersteinDiceLoss([[0.0, 1.0], [1.0, 0.0]])
    z, y = torch.randn(1, 2, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8)
    assert "backend: eager (generalized_wasserstein_dice_loss has no kernel" in dicekernels.explain(
        loss, z, y
    )
    mask = torch.ones(1, 1, 8, 8, 8, requires_grad=True)
    told = dicekernels.explain(lambda z, y: loss(z, y, mask=mask), z, y)
    assert "on the whole volume at once: another tensor than the logits requires a gradient" in told
    with dicekernels.use_backend("eager"):
        loss(z, y)
    if "cpu" in dicekernels.available_backends():
        with (
            dicekernels.use_backend("cpu"),
            pytest.raises(RuntimeError, match="'cpu' was forced, but no kernel"),
        ):
            loss(z, y)
