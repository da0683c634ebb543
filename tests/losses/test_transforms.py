"""The losses under torch.func and forward mode: the derivatives of the oracle, by every transform."""

from __future__ import annotations

import pytest
import torch
from cases import make_logits, make_mask, make_values, swept
from integration_cases import KERNELS, LOSSES, STREAMED, Step, data, layer
from torch import func
from torch.autograd import forward_ad

import dicekernels
from dicekernels import functional, reference, region_sums
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

F32, F64 = torch.float32, torch.float64
SPACE = (2, 3, 4)
every_kernel = pytest.mark.parametrize("name", KERNELS)


def gradient(step, logits, *others):
    """By autograd, which test_ops.py checks."""
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(step(leaf, *others), leaf)[0]


def samples(arguments):
    """The arguments of each sample alone, as a batch of one."""
    return [tuple(x[i : i + 1] for x in arguments) for i in range(len(arguments[0]))]


@every_kernel
def test_reverse_mode(name, backend):
    step, arguments = Step(name, dicekernels), data(name)
    value, expected = step(*arguments), gradient(step, *arguments)
    assert torch.equal(func.grad(step)(*arguments), expected)
    got, same = func.grad_and_value(step)(*arguments)
    assert torch.equal(got, expected)
    assert torch.equal(same, value)
    same, pull = func.vjp(lambda z: step(z, *arguments[1:]), arguments[0])
    assert torch.equal(same, value)
    assert torch.equal(pull(torch.ones_like(value))[0], expected)
    assert torch.equal(func.jacrev(step)(*arguments), expected)


@pytest.mark.parametrize("name", STREAMED)
def test_grad_of_the_streamed_losses(name):
    step, arguments = Step(name, dicekernels), data(name)
    truth = gradient(step, arguments[0].double(), *arguments[1:])
    honest = gradient(step, *arguments)
    assert_gradient_close(func.grad(step)(*arguments), truth, honest, F32, name)


@pytest.mark.parametrize("name", LOSSES)
def test_functional_call_with_the_parameters_of_a_step(name):
    """As meta learning does: the loss after a step, differentiated through the step."""
    step, arguments = Step(name, dicekernels, layer(name).double()), data(name, F64, SPACE)
    parameters = {key: value.detach() for key, value in step.named_parameters()}

    def loss(parameters):
        return func.functional_call(step, parameters, arguments)

    def after_a_step(parameters):
        slopes = func.grad(loss)(parameters)
        return loss({key: value - 0.5 * slopes[key] for key, value in parameters.items()})

    got = func.grad(after_a_step)(parameters)
    leaves = {key: value.clone().requires_grad_() for key, value in parameters.items()}
    slopes = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    moved = {key: leaves[key] - 0.5 * s for key, s in zip(leaves, slopes, strict=True)}
    expected = torch.autograd.grad(loss(moved), list(leaves.values()))
    for key, truth in zip(leaves, expected, strict=True):
        assert_gradient_close(got[key], truth.double(), truth.float(), F32, f"{name} {key}")


def test_the_buffers_of_a_loss_in_functional_call():
    logits, labels, _ = data("DiceLoss")
    loss = dicekernels.DiceLoss(to_onehot_y=True, softmax=True, weight=[0.2, 0.3, 0.5])
    doubled = func.functional_call(loss, {"class_weight": 2 * loss.class_weight}, (logits, labels))
    assert torch.equal(doubled, 2 * loss(logits, labels))


@every_kernel
def test_vmap_gives_the_bits_of_a_loop(name, backend):
    step, arguments = Step(name, dicekernels), data(name)

    def of_one(*sample):
        return step(*(x[None] for x in sample))

    expected = torch.stack([step(*sample) for sample in samples(arguments)])
    assert torch.equal(func.vmap(of_one)(*arguments), expected)
    slopes = torch.cat([gradient(step, *sample) for sample in samples(arguments)])
    assert torch.equal(func.vmap(func.grad(of_one))(*arguments), slopes)
    # The same labels for each: not every argument has the dimension.
    expected = torch.stack([step(z[None], *samples(arguments)[0][1:]) for z in arguments[0]])
    others = [x[0] for x in arguments[1:]]
    assert torch.equal(func.vmap(lambda z: of_one(z, *others))(arguments[0]), expected)


MODES = swept(["DiceCELoss", "GeneralizedDiceLoss", "DiceFocalLoss", "MCCLoss"], now=["DiceCELoss"])


@pytest.mark.parametrize("name", MODES)
def test_every_mode_of_gradcheck(name, backend):
    step = Step(name, dicekernels).double()
    logits, *others = data(name, F64, SPACE)
    logits.requires_grad_()
    if name == "DiceFocalLoss":  # whose loss is float32, as MONAI's
        step.loss.lambda_focal = 0.0

    def loss(z):
        return step(z, *others)

    assert torch.autograd.gradcheck(loss, logits, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, logits, check_fwd_over_rev=True, check_batched_grad=True)


def test_every_mode_of_gradcheck_for_region_sums(backend):
    logits, labels, _ = data("DiceLoss", F64, SPACE)
    logits.requires_grad_()

    def rows(z):
        sums = region_sums(z, labels, voxel_term="ce")
        return torch.stack([sums.FP, sums.POS])

    assert torch.autograd.gradcheck(rows, logits, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(rows, logits, check_fwd_over_rev=True, check_batched_grad=True)
    assert torch.equal(
        func.vmap(lambda z, y: region_sums(z[None], y[None]).I)(logits, labels)[:, 0],
        region_sums(logits, labels).I,
    )


def test_hessians_agree():
    step, arguments = Step("DiceCELoss", dicekernels), data("DiceCELoss", F64, SPACE)
    forward_over_reverse = func.hessian(step)(*arguments)
    given = {"to_onehot_y": True, "softmax": True, "lambda_ce": 0.5, "weight": torch.tensor([0.2, 0.3, 0.5])}
    truth = func.hessian(lambda z: reference.dice_ce_loss(z, arguments[1], **given))(arguments[0])
    for got in (forward_over_reverse, func.jacrev(func.jacrev(step))(*arguments)):
        assert_gradient_close(got, truth, truth, F64, "hessian")


def test_dual_numbers_of_autograd():
    step, (logits, *others) = Step("DiceCELoss", dicekernels), data("DiceCELoss", F64)
    along = make_logits(tuple(logits.shape), F64, seed=9)
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(step(forward_ad.make_dual(logits, along), *others))
    assert torch.equal(value, step(logits, *others))
    truth = (gradient(step, logits, *others) * along).sum()
    assert_close_to_truth(tangent, truth, truth.float(), F32, "jvp")


def ours(logits, target, mask, weight):
    return functional.dice_ce_loss(logits, target, softmax=True, mask=mask, weight=weight)


def oracle(logits, target, mask, weight):
    return reference.dice_ce_loss(logits, target, softmax=True, mask=mask, weight=weight)


def mixed(loss, which):
    """Argument -> slope along a fixed direction of the logits' gradient."""

    def slope(value, arguments):
        arguments = [value if i == which else x for i, x in enumerate(arguments)]
        direction = make_logits(tuple(arguments[0].shape), F64, seed=9)
        return (func.grad(loss)(*arguments) * direction).sum()

    return lambda arguments: func.grad(slope)(arguments[which], arguments)


OVER = {
    "grad": lambda loss, which: lambda x: func.grad(loss, argnums=which)(*x),
    "value inside": lambda loss, which: (
        lambda x: func.grad(
            lambda v: func.grad_and_value(loss)(*(v if i == which else y for i, y in enumerate(x)))[1]
        )(x[which])
    ),
    "mixed": mixed,
    "forward": lambda loss, which: lambda x: func.jacfwd(loss, argnums=which)(*x),
}


@pytest.mark.parametrize("kind", OVER)
@pytest.mark.parametrize("which", [1, 2, 3])
def test_over_target_mask_and_weight(kind, which):
    shape = (2, 3, *SPACE)
    mask = make_mask("fraction", shape, F64) + 0.5
    weight = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    arguments = [make_logits(shape, F64), make_values(shape, F64), mask, weight]
    truth = OVER[kind](oracle, which)(arguments)
    assert truth.any()
    assert_gradient_close(OVER[kind](ours, which)(arguments), truth, truth.float(), F32, kind)


def test_region_sums_over_the_target():
    logits, values = make_logits((2, 3, *SPACE), F64), make_values((2, 3, *SPACE), F64)

    def sums(z, y):
        return region_sums(z, y).FN.square().sum()

    def plain(z, y):
        return ((1 - z.softmax(1)) * y).sum((2, 3, 4)).square().sum()

    for which in OVER:
        truth = OVER[which](plain, 1)([logits, values])
        assert_gradient_close(OVER[which](sums, 1)([logits, values]), truth, truth, F64, which)


@every_kernel
def test_a_backward_with_create_graph_has_the_bits_of_one_without(name, backend):
    step, arguments = Step(name, dicekernels), data(name)
    leaf = arguments[0].requires_grad_()
    (got,) = torch.autograd.grad(step(leaf, *arguments[1:]), leaf, create_graph=True)
    assert torch.equal(got, gradient(step, *arguments))
