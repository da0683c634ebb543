"""Each loss module where torch takes modules: export, copies, state, checkpoints, mixed precision, loops."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import monai.losses
import pytest
import torch
from cases import swept
from integration_cases import KERNELS, LOSSES, SPACE, Step, data, layer
from monai.data import MetaTensor
from torch.utils.checkpoint import checkpoint

import dicekernels
from dicekernels.dispatch import BACKENDS
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
every_loss = pytest.mark.parametrize("name", LOSSES)


def bits(step, logits, *others):
    """Value and the gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    value = step(leaf, *others)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def assert_same(got, expected):
    for ours, plain in zip(got, expected, strict=True):
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)


def parameter_gradients(module):
    return [parameter.grad for parameter in module.parameters()]


def exported(step, arguments, **options):
    """The program, saved and loaded, as a module with parameters of its own."""
    file = io.BytesIO()
    torch.export.save(torch.export.export(step, arguments, **options), file)
    file.seek(0)
    return torch.export.load(file).module()


@every_loss
def test_an_exported_training_step_has_the_bits_of_eager(name):
    step = Step(name, dicekernels, layer(name))
    program = exported(step, data(name))
    for seed in range(2):
        logits, labels, mask = data(name, seed=seed)
        assert torch.equal(program(logits, labels, mask), step(logits, labels, mask))
    for module in (step, program):
        module.zero_grad()
        module(*data(name)).backward()
    for ours, plain in zip(parameter_gradients(program), parameter_gradients(step), strict=True):
        assert plain.any()
        assert torch.equal(ours, plain)


# The streamed losses fix the space when they are traced.
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("strict", swept([False, True], now=[False]))
def test_a_program_exported_for_any_size(name, strict):
    step = Step(name, dicekernels)
    size = torch.export.Dim.DYNAMIC
    space = {2: size, 3: size, 4: size}
    program = exported(step, data(name), dynamic_shapes=(space, space, space), strict=strict)
    # Fewer voxels than one chunk of 4096, about as many, and several chunks.
    for other in (SPACE, (16, 16, 16), (18, 20, 22)):
        arguments = data(name, space=other, seed=1)
        assert_same(bits(program, *arguments), bits(step, *arguments))


def test_an_exported_loss_alone_and_its_second_derivative(backend):
    logits, labels, _ = data("DiceCELoss", F64)
    loss = dicekernels.DiceCELoss(to_onehot_y=True, softmax=True, lambda_ce=0.3)
    program = exported(loss, (logits, labels))
    names = [str(node.target) for node in torch.export.export(loss, (logits, labels)).graph.nodes]
    penalties = []
    for function in (program, loss):
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, labels), leaf, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    assert f"{BACKENDS[backend].namespace}.loss.default" in names
    assert torch.equal(*penalties)


def test_opcheck_of_the_ops_of_a_program(backend):
    # Schema, fake against real, autograd, and tracing with fixed and dynamic shapes.
    loss = dicekernels.DiceCELoss(to_onehot_y=True, softmax=True, batch=True, weight=[0.2, 0.3, 0.5])
    logits, labels, _ = data("DiceCELoss")
    logits.requires_grad_()
    namespace = BACKENDS[backend].namespace
    graph = torch.export.export(loss, (logits, labels)).graph
    (node,) = [node for node in graph.nodes if str(node.target) == f"{namespace}.loss.default"]
    metas = [arg.meta["val"] if isinstance(arg, torch.fx.Node) else None for arg in node.args[2:8]]
    weights = [None if meta is None else torch.rand(meta.shape, dtype=meta.dtype) for meta in metas]
    torch.library.opcheck(node.target, (logits, labels, *weights, *node.args[8:]))
    rows = torch.export.export(Score(), (logits, labels)).graph
    (node,) = [node for node in rows.nodes if "totals" in str(node.target)]
    totals = getattr(torch.ops, namespace).totals.default
    torch.library.opcheck(totals, (logits, labels, *node.args[2:]))


class Score(torch.nn.Module):
    """F2 loss of one's own."""

    def forward(self, logits, labels):
        sums = dicekernels.region_sums(logits, labels)
        return 1 - (5 * sums.I / (5 * sums.I + sums.FP + 4 * sums.FN)).mean()


def test_a_program_may_be_compiled():
    step = Step("DiceCELoss", dicekernels)
    program = torch.export.export(step, data("DiceCELoss"))
    for function in (
        torch.compile(program.module(), backend="aot_eager"),
        program.run_decompositions().module(),
    ):
        assert_same(bits(function, *data("DiceCELoss", seed=1)), bits(step, *data("DiceCELoss", seed=1)))


def test_exported_sums_train():
    logits, labels, _ = data("DiceLoss")
    assert_same(bits(exported(Score(), (logits, labels)), logits, labels), bits(Score(), logits, labels))


@every_loss
@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(name, make):
    step = Step(name, dicekernels)
    assert_same(bits(make(step), *data(name)), bits(step, *data(name)))


def test_an_activation_of_the_users_travels_along():
    logits, labels, _ = data("DiceLoss")
    for kind in (dicekernels.DiceLoss, dicekernels.TverskyLoss, dicekernels.DiceFocalLoss):
        loss = kind(to_onehot_y=True, other_act=torch.tanh, include_background=False)
        twin = pickle.loads(pickle.dumps(loss))
        assert getattr(twin, "dice", twin).other_act is torch.tanh
        assert_same(bits(twin, logits, labels), bits(loss, logits, labels))


@every_loss
def test_a_state_dict_goes_through_monais_module_and_back(name):
    doubled, theirs, ours = (
        Step(name, library, factor=factor)
        for library, factor in ((dicekernels, 2.0), (monai.losses, 1.0), (dicekernels, 1.0))
    )
    before = ours(*data(name))
    assert list(theirs.state_dict()) == list(doubled.state_dict())
    theirs.load_state_dict(doubled.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours(*data(name)), doubled(*data(name)))
    assert bool(ours.state_dict()) == bool(before != ours(*data(name)))


@every_loss
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_meta_tensors_in_and_out(name, which):
    step, theirs = Step(name, dicekernels), Step(name, monai.losses)
    plain = data(name)
    arguments = [MetaTensor(x) if i in which else x for i, x in enumerate(plain)]
    assert type(step(*arguments)) is type(theirs(*arguments))
    value, gradient = bits(step, *arguments)
    assert_same((value.as_subclass(torch.Tensor), gradient.as_subclass(torch.Tensor)), bits(step, *plain))


@every_loss
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_network_and_loss(name, reentrant):
    step = Step(name, dicekernels, layer(name))
    gradients = []
    for run in (step, lambda *x: checkpoint(step, *x, use_reentrant=reentrant)):
        step.zero_grad()
        logits, labels, mask = data(name)
        run(logits.requires_grad_(), labels, mask).backward()
        gradients.append([logits.grad, *(g.clone() for g in parameter_gradients(step))])
    assert_same(*gradients)


@every_loss
def test_gradients_accumulate_over_micro_batches(name):
    step = Step(name, dicekernels, layer(name))
    parts = [data(name, seed=seed) for seed in range(3)]
    for part in parts:
        (step(*part) / 4).backward()  # a power of two scales without rounding
    accumulated = [g.clone() for g in parameter_gradients(step)]
    expected = None
    for part in parts:
        gradient = torch.autograd.grad(step(*part), list(step.parameters()))
        expected = gradient if expected is None else [a + b for a, b in zip(expected, gradient, strict=True)]
    assert_same(accumulated, [g / 4 for g in expected])


def test_dice_of_a_batch_is_the_mean_of_its_micro_batches():
    step = Step("DiceLoss", dicekernels)
    logits, labels, mask = data("DiceLoss")

    def split(function, dtype):
        leaf = logits.to(dtype).requires_grad_()
        losses = [function(leaf[i : i + 1], labels[i : i + 1], mask[i : i + 1]) / 2 for i in range(2)]
        return torch.autograd.grad(sum(losses), leaf)[0]

    truth = bits(Step("DiceLoss", monai.losses), logits.double(), labels, mask)[1]
    honest = bits(Step("DiceLoss", monai.losses), logits, labels, mask)[1]
    assert_gradient_close(split(step, F32), truth, honest, F32, "micro-batches")


@every_loss
def test_a_grad_scaler_saves_small_gradients_of_float16_logits(name):
    # In 2 x 16^3 voxels most gradients lie below what float16 holds.
    logits, labels, mask = data(name, F16, (16, 16, 16))
    step, scale = Step(name, dicekernels), 2.0**12
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    leaf = logits.requires_grad_()
    scaler.scale(step(leaf, labels, mask)).backward()
    assert leaf.grad.dtype == F16
    (wide,) = bits(Step(name, monai.losses).double(), logits.double(), labels, mask)[1:]
    (single,) = bits(Step(name, monai.losses), logits.float(), labels, mask)[1:]
    honest = (single * scale).to(F16).double() / scale
    assert_gradient_close(leaf.grad.double() / scale, wide, honest, F16, name)


def scaled_steps(step, inputs, scale, steps):
    """(scale after each step, whether the parameters moved) of steps with a GradScaler in float16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(step.layer.parameters(), lr=0.1)
    history = []
    for _ in range(steps):
        before = [parameter.detach().clone() for parameter in step.layer.parameters()]
        optimizer.zero_grad()
        images, labels, mask = inputs
        logits = step.layer(images).to(F16)
        value = step.loss(logits, labels, mask) if "Masked" in step.name else step.loss(logits, labels)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before, step.layer.parameters(), strict=True))
        history.append((scaler.get_scale(), moved))
    return history


@pytest.mark.parametrize("name", ["DiceLoss", "DiceCELoss", "DiceFocalLoss", "MCCLoss", "MaskedDiceLoss"])
def test_an_overflow_is_seen_by_the_grad_scaler(name):
    # 2^40 times a gradient overflows float16; each inf halves the scale and leaves the parameters.
    step = Step(name, dicekernels, layer(name))
    history = scaled_steps(step, data(name), 2.0**40, 3)
    assert history == [(2.0**39, False), (2.0**38, False), (2.0**37, False)]
    assert scaled_steps(step, data(name), 2.0**8, 1) == [(2.0**8, True)]


@every_loss
def test_autocast(name):
    step, theirs = Step(name, dicekernels), Step(name, monai.losses)
    images, labels, mask = data(name)
    with torch.autocast("cpu", BF16):
        logits = layer(name)(images)
        value, gradient = bits(step, logits, labels, mask)
    assert logits.dtype == gradient.dtype == BF16
    assert value.dtype == F32
    honest = bits(theirs, logits.float(), labels, mask)
    truth = bits(theirs.double(), logits.double(), labels, mask)
    assert_close_to_truth(value, truth[0].double(), honest[0], F32, name)
    assert_gradient_close(gradient, truth[1], honest[1].to(BF16), BF16, name)


def trained(name, validate, wrap=lambda step: step):
    """Losses of four steps, with a validation under inference_mode between them or without."""
    step = Step(name, dicekernels, layer(name))
    run = wrap(step)
    optimizer, losses = torch.optim.Adam(step.parameters(), lr=0.1), []
    for i in range(4):
        optimizer.zero_grad()
        value = run(*data(name, seed=i % 2))
        value.backward()
        optimizer.step()
        losses.append(value.item())
        if validate:
            with torch.inference_mode():
                kept = step(*data(name, seed=7))
            assert kept.is_inference()
            with torch.no_grad():
                assert torch.equal(step(*data(name, seed=7)), kept)
    return losses


@every_loss
def test_validation_between_the_steps_changes_nothing(name):
    losses = trained(name, validate=True)
    assert losses == trained(name, validate=False)
    assert losses[2] < losses[0]


@pytest.mark.parametrize("name", ["DiceFocalLoss", "MCCLoss", "GeneralizedDiceFocalLoss"])
def test_a_compiled_training_step(name):
    torch.compiler.reset()

    def wrap(step):
        return torch.compile(step, fullgraph=True, backend="aot_eager")

    with torch._dynamo.config.patch(error_on_recompile=True):
        assert trained(name, False, wrap) == trained(name, False)


# MaskedLoss multiplies by the mask in PyTorch, which refuses such a mask, as MONAI's does.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "MaskedLoss"])
def test_what_inference_mode_made_can_be_trained_on(name):
    with torch.inference_mode():
        logits, labels, mask = data(name)
    step = Step(name, dicekernels, layer(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(logits.clone(), labels, mask).backward()
    plain = Step(name, dicekernels, layer(name))
    plain(*data(name)).backward()
    assert_same(parameter_gradients(step), parameter_gradients(plain))
