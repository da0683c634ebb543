"""The ops as torch sees them, and autograd through every public loss: first and second order, odd uses."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    generator,
    gradient,
    laid_out,
    make_labels,
    make_logits,
    make_mask,
    make_values,
    oracle_rows,
    swept,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dicekernels
from dicekernels import functional, reference, region_sums
from dicekernels.dispatch import BACKENDS
from dicekernels.spec import (
    BAD,
    LS,
    NEG,
    OVERLAP_ROWS,
    POS,
    Activation,
    Denominator,
    FinishSpec,
    Formula,
    G,
    N,
    Overlap,
    Reduction,
    SumsSpec,
    VoxelTerm,
)
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

F64 = torch.float64
CE_ROWS = OVERLAP_ROWS | G | POS | LS | N

LABELS = SumsSpec(False, Activation.SOFTMAX, rows=CE_ROWS | BAD, voxel_term=VoxelTerm.CE, ignore_index=255)
VALUES = SumsSpec(
    True,
    Activation.SIGMOID,
    overlap=Overlap.MIN,
    voxel_term=VoxelTerm.BCE,
    rows=OVERLAP_ROWS | POS | NEG | N,
    product_mask=True,
)
PROBLEMS = {
    "labels": (make_logits((2, 3, 5, 7)), make_labels((2, 1, 5, 7), 3), None, LABELS),
    "labels without channel": (make_logits((2, 3, 5, 7)), make_labels((2, 5, 7), 3), None, LABELS),
    "values and mask": (
        make_logits((2, 4, 3, 5, 7), torch.float16),
        make_values((2, 4, 3, 5, 7), torch.int16),
        make_mask("fraction", (2, 4, 3, 5, 7)),
        VALUES,
    ),
    "channels_last_3d": (
        laid_out(make_logits((2, 3, 4, 5, 6)), "channels_last_3d"),
        make_labels((2, 1, 4, 5, 6), 3, torch.int64),
        None,
        LABELS,
    ),
    "slice": (laid_out(make_logits((2, 3, 40), F64), "class_slice"), make_values((2, 3, 40)), None, VALUES),
    "empty batch": (make_logits((0, 3, 40)), make_labels((0, 1, 40), 3), None, LABELS),
}
FINISHES = {
    "mean": FinishSpec(Formula.RATIO, denominator=Denominator.WEIGHTS, label_smoothing=0.1),
    "none": FinishSpec(Formula.RATIO, reduction=Reduction.NONE, skipped=1),
    "none, batch": FinishSpec(Formula.GENERALIZED, reduction=Reduction.NONE, batch=True),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_opcheck_of_the_passes(problem, backend):
    # Schema, fake against real (shape, dtype, strides), and tracing with fixed and dynamic shapes.
    logits, target, mask, spec = PROBLEMS[problem]
    op = getattr(torch.ops, BACKENDS[backend].namespace)
    torch.library.opcheck(op.sums.default, (logits, target, mask, *spec.args()))
    coef = make_logits((*logits.shape[:2], spec.rows.bit_count()), F64, seed=5)
    for grad in (None, torch.tensor(0.5), torch.rand(logits.shape[0], 1)):
        args = (grad, logits, target, mask, coef, *spec.args())
        torch.library.opcheck(op.sums_backward.default, args)
        got = op.sums_backward(*args)
        assert (got.shape, got.dtype) == (logits.shape, logits.dtype)
        assert got.stride() == torch.empty_like(logits).stride()


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_opcheck_of_finish(finish, dtype, backend):
    spec = FINISHES[finish]
    rows = CE_ROWS if finish == "mean" else OVERLAP_ROWS | G
    slots = 100 * torch.rand(2, 3, 4, rows.bit_count(), generator=generator(0), dtype=F64)
    weights = (torch.rand(4 - spec.skipped), torch.rand(4), None, torch.tensor(0.5), None)
    args = (slots, *weights, rows, *spec.args(False), dtype)
    op = getattr(torch.ops, BACKENDS[backend].namespace).finish
    torch.library.opcheck(op.default, args)
    loss, coef = op(*args)
    assert (loss.shape, loss.dtype) == (spec.loss_shape(2, 4), dtype)
    assert (coef.shape, coef.dtype) == ((2, 4, rows.bit_count()), F64)


HOT = {"to_onehot_y": True, "softmax": True}
LOSSES = {
    "dice": (functional.dice_loss, HOT),
    "dice sigmoid": (functional.dice_loss, {"sigmoid": True, "jaccard": True, "batch": True}),
    "dice squared": (functional.dice_loss, HOT | {"squared_pred": True, "include_background": False}),
    "dice log": (functional.dice_loss, HOT | {"log_loss": True, "weight": [0.2, 0.5, 1.0]}),
    "dice none": (functional.dice_loss, HOT | {"reduction": "none", "ignore_index": 1}),
    "dice soft": (functional.dice_loss, {"softmax": True, "soft_label": True}),
    "generalized": (functional.generalized_dice_loss, HOT),
    "gdl simple": (functional.generalized_dice_loss, {"sigmoid": True, "w_type": "simple", "batch": True}),
    "tversky": (functional.tversky_loss, HOT | {"alpha": 0.3, "beta": 0.7}),
    "tversky focal": (functional.tversky_loss, HOT | {"gamma": 0.75, "reduction": "none", "batch": True}),
    "dice_ce": (functional.dice_ce_loss, HOT | {"lambda_dice": 0.7, "label_smoothing": 0.1}),
    "dice_ce weights": (
        functional.dice_ce_loss,
        HOT | {"weight": [0.2, 0.5, 1.0], "include_background": False},
    ),
    "dice_ce values": (functional.dice_ce_loss, {"sigmoid": True, "reduction": "sum", "squared_pred": True}),
}


def problem_of(name, dtype=F64, shape=(2, 3, 4, 5)):
    """(loss of logits and target, the oracle's, logits, target)."""
    loss, options = LOSSES[name]
    oracle = getattr(reference, loss.__name__)
    target = make_labels((shape[0], 1, *shape[2:]), shape[1])
    if not options.get("to_onehot_y"):
        target = make_values(shape, F64).to(dtype)
    return (
        lambda z, y, **more: loss(z, y, **options | more),
        lambda z, y, **more: oracle(z, y, **options | more),
        make_logits(shape, dtype),
        target,
    )


@pytest.mark.parametrize("name", swept(LOSSES, now=("dice", "generalized", "tversky focal", "dice_ce")))
def test_gradcheck_to_second_order(name, backend):
    loss, _, logits, target = problem_of(name)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, target), logits)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, target), logits)


def test_gradcheck_of_region_sums(backend):
    logits, labels = make_logits((2, 3, 11), F64).requires_grad_(), make_labels((2, 1, 11), 3)
    for options in ({"voxel_term": "ce"}, {"activation": "sigmoid", "voxel_term": "focal_sigmoid"}):

        def rows(z, options=options):
            return torch.stack([row for row in region_sums(z, labels, **options) if row is not None])

        assert torch.autograd.gradcheck(rows, logits)
        assert torch.autograd.gradgradcheck(rows, logits)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivative_equals_the_oracles(name, dtype, backend):
    loss, oracle, logits, target = problem_of(name, dtype)

    def penalty(function, z, y):
        z = z.detach().requires_grad_()
        (grad,) = torch.autograd.grad(function(z, y).sum(), z, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), z)[0]

    wide = target.double() if target.is_floating_point() else target
    single = target.float() if target.is_floating_point() else target
    truth = penalty(oracle, logits.double(), wide)
    honest = penalty(oracle, logits.float(), single).to(dtype)
    if dtype == torch.bfloat16:  # the inner gradient is rounded to bfloat16, too
        z = logits.detach().requires_grad_()
        (grad,) = torch.autograd.grad(oracle(z.float(), single).sum(), z, create_graph=True)
        honest = torch.autograd.grad(grad.square().sum(), z)[0]
    assert_gradient_close(penalty(loss, logits, target), truth, honest, dtype, name)


@pytest.mark.parametrize("name", [name for name in LOSSES if not LOSSES[name][1].get("to_onehot_y")])
def test_a_target_that_requires_grad(name):
    loss, oracle, logits, target = problem_of(name)
    for function in (loss, oracle):
        assert not function(logits, target).requires_grad
    logits.requires_grad_(), target.requires_grad_()
    ours = torch.autograd.grad(loss(logits, target).sum(), (logits, target))
    truth = torch.autograd.grad(oracle(logits, target).sum(), (logits, target))
    for got, expected, what in zip(ours, truth, ("logits", "target"), strict=True):
        assert_gradient_close(got, expected, expected, F64, f"{name} {what}")
    with (
        dicekernels.use_backend("cpu"),
        pytest.raises(RuntimeError, match="'cpu' was forced, but target requires a gradient, .* detach it"),
    ):
        loss(logits, target)


@pytest.mark.parametrize("name", ["dice", "generalized", "tversky", "dice_ce", "dice soft"])
def test_a_mask_that_requires_grad(name):
    loss, oracle, logits, target = problem_of(name)
    mask = make_mask("fraction", logits.shape, F64)
    mask = torch.where(mask == 0, 0.5, mask).requires_grad_()
    logits.requires_grad_()
    ours = torch.autograd.grad(loss(logits, target, mask=mask).sum(), (logits, mask))
    truth = torch.autograd.grad(oracle(logits, target, mask=mask).sum(), (logits, mask))
    for got, expected, what in zip(ours, truth, ("logits", "mask"), strict=True):
        assert_gradient_close(got, expected, expected, F64, f"{name} {what}")
    with dicekernels.use_backend("cpu"), pytest.raises(RuntimeError, match="forced, but mask requires"):
        loss(logits, target, mask=mask)


def test_weights_and_factors_that_require_grad():
    loss, oracle, logits, target = problem_of("dice_ce")
    weight = torch.tensor([0.2, 0.5, 1.0], dtype=F64, requires_grad=True)
    factor = torch.tensor(0.6, dtype=F64, requires_grad=True)
    options = {"weight": weight, "lambda_ce": factor}
    leaves = (logits.requires_grad_(), weight, factor)
    ours = torch.autograd.grad(loss(logits, target, **options), leaves)
    truth = torch.autograd.grad(oracle(logits, target, **options), leaves)
    for got, expected, what in zip(ours, truth, ("logits", "weight", "lambda_ce"), strict=True):
        assert_gradient_close(got, expected, expected, F64, what)


def test_region_sums_of_a_target_that_requires_grad():
    logits, values = (
        make_logits((2, 3, 40), F64).requires_grad_(),
        make_values((2, 3, 40), F64).requires_grad_(),
    )
    ours = torch.autograd.grad(region_sums(logits, values).FN.square().sum(), (logits, values))
    truth = torch.autograd.grad(oracle_rows(logits, values)["FN"].square().sum(), (logits, values))
    for got, expected in zip(ours, truth, strict=True):
        assert_gradient_close(got, expected, expected, F64, "region_sums")
    with dicekernels.use_backend("cpu"), pytest.raises(RuntimeError, match="forced, but target requires"):
        region_sums(logits, values)


@pytest.mark.parametrize("name", LOSSES)
def test_twice_in_one_graph_and_backward_twice(name, backend):
    loss, _, logits, target = problem_of(name, torch.float32)
    logits.requires_grad_()
    once = gradient(lambda z: loss(z, target).sum(), logits)
    value = loss(logits, target).sum()
    first = torch.autograd.grad(value, logits, retain_graph=True)[0]
    second = torch.autograd.grad(value, logits)[0]
    assert torch.equal(first, once)
    assert torch.equal(second, once)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, logits)
    both = gradient(lambda z: (loss(z, target) + loss(z, target)).sum(), logits)
    assert torch.equal(both, once + once)
    (loss(logits, target) * 4).sum().backward()  # a power of two scales without rounding
    assert torch.equal(logits.grad, 4 * once)


@pytest.mark.parametrize("name", ["dice none", "tversky focal"])
def test_unreduced_terms_have_their_own_gradients(name, backend):
    loss, oracle, logits, target = problem_of(name, torch.float32)
    factors = make_logits(tuple(loss(logits, target).shape), seed=9)
    got = gradient(lambda z: (factors * loss(z, target)).sum(), logits)
    truth, honest = (
        gradient(lambda z: (factors * oracle(z, target)).sum(), logits, dtype)
        for dtype in (F64, torch.float32)
    )
    assert_gradient_close(got, truth, honest, torch.float32, name)


def test_an_undefined_gradient_gives_none_or_zero(backend):
    loss, _, logits, target = problem_of("dice_ce", torch.float32)
    logits.requires_grad_()
    undefined = torch._C._functions.UndefinedGrad()
    undefined(loss(logits, target)).backward()
    assert logits.grad is None or not logits.grad.any()
    # Only one of the rows is used: the others' slopes are materialised as zeros.
    got = gradient(lambda z: region_sums(z, target).I.sum(), logits)
    truth = gradient(lambda z: oracle_rows(z, target)["I"].sum(), logits, F64)
    honest = gradient(lambda z: oracle_rows(z, target, torch.float32)["I"].sum(), logits)
    assert_gradient_close(got, truth, honest, torch.float32, "I alone")


@pytest.mark.parametrize("name", LOSSES)
def test_no_grad_and_detached(name, backend):
    loss, _, logits, target = problem_of(name, torch.float32)
    expected = loss(logits, target)
    logits.requires_grad_()
    assert loss(logits, target).requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            value = loss(logits, target)
        assert not value.requires_grad
        assert torch.equal(value, expected)
    assert not expected.requires_grad


@pytest.mark.parametrize("name", ["dice", "generalized", "tversky", "dice_ce"])
def test_autocast(name, backend):
    loss, oracle, _, target = problem_of(name, torch.float32, (2, 3, 12, 13))
    images = make_logits((2, 3, 12, 13), seed=4)
    network = torch.nn.Conv2d(3, 3, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
        value = loss(logits, target)
    assert logits.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    truth = oracle(logits.detach().double(), target)
    assert_close_to_truth(value, truth, oracle(logits.detach().float(), target), torch.float32, name)
    (got,) = torch.autograd.grad(value, logits)
    truth, honest = (gradient(lambda z: oracle(z, target), logits, kind) for kind in (F64, torch.float32))
    assert_gradient_close(got, truth, honest.to(torch.bfloat16), torch.bfloat16, name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant, backend):
    loss, _, logits, target = problem_of("dice_ce", torch.float32)
    leaf = logits.detach().requires_grad_()
    checkpoint(lambda x: loss(2 * x, target), leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, gradient(lambda z: loss(2 * z, target), logits))


class _Forwarding(TorchDispatchMode):
    """Runs every op as it is, below autograd, as loggers, counters and selective checkpointing do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_under_a_dispatch_mode(backend):
    loss, _, logits, target = problem_of("dice_ce", torch.float32)
    plain = gradient(lambda z: loss(z, target), logits)
    z = logits.detach().requires_grad_()
    with _Forwarding():
        value = loss(z, target)
    assert torch.equal(torch.autograd.grad(value, z)[0], plain)
    with _Forwarding():
        assert torch.equal(gradient(lambda z: loss(z, target), logits), plain)


def test_an_inplace_change_between_the_passes_is_noticed(backend):
    loss, _, logits, target = problem_of("dice_ce", torch.float32)
    z = logits.requires_grad_() * 1
    value = loss(z, target)
    z.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_weight_is_checked_once_for_each_of_its_states():
    weight = torch.tensor([0.2, 0.5, 1.0])
    loss = dicekernels.DiceLoss(**HOT, weight=weight)
    logits, target = make_logits((2, 3, 9)), make_labels((2, 1, 9), 3)
    assert torch.equal(loss(logits, target), loss(logits, target))
    weight[1] = -0.5
    with pytest.raises(ValueError, match="`weight` should be no less than 0"):
        loss(logits, target)


def test_modules_are_copied_with_their_state():
    loss = dicekernels.DiceCELoss(**HOT, weight=torch.tensor([0.2, 0.5, 1.0]), lambda_dice=0.3)
    _, _, logits, target = problem_of("dice_ce", torch.float32)
    twin = copy.deepcopy(loss)
    assert torch.equal(twin(logits, target), loss(logits, target))
    twin.lambda_dice = 0.9
    assert loss.lambda_dice == 0.3
    assert twin(logits, target) != loss(logits, target)


def test_a_forced_backend_that_cannot_run_gives_its_reason():
    labels = make_labels((1, 1, 9), 3)
    with dicekernels.use_backend("cpu"):
        with pytest.raises(RuntimeError, match="backend 'cpu' was forced, but the logits are on meta"):
            region_sums(torch.empty(1, 3, 9, device="meta"), labels.to("meta"))
        with pytest.raises(RuntimeError, match="'cpu' was forced, but the logits have 5000 classes"):
            functional.dice_loss(torch.zeros(1, 5000, 9), labels, **HOT)
        with pytest.raises(RuntimeError, match="'cpu' was forced, but the logits have no spatial dim"):
            functional.dice_loss(torch.zeros(2, 3), torch.zeros(2, 3))
