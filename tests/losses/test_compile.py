"""Under torch.compile(fullgraph=True): the bits of eager, and no needless recompilation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import make_labels, make_logits, make_mask, make_values
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import dicekernels
from dicekernels import (
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceFocalLoss,
    GeneralizedDiceLoss,
    MaskedDiceLoss,
    MCCLoss,
    TverskyLoss,
    region_sums,
)

HOT = {"to_onehot_y": True, "softmax": True}
SHAPE = (2, 3, 4, 5, 6)
MODULES = {
    "dice": lambda: DiceLoss(**HOT),
    "dice options": lambda: DiceLoss(
        **HOT, include_background=False, squared_pred=True, batch=True, reduction="none", weight=[0.3, 0.7]
    ),
    "dice values": lambda: DiceLoss(sigmoid=True, soft_label=True, log_loss=True),
    "generalized": lambda: GeneralizedDiceLoss(**HOT),
    "tversky": lambda: TverskyLoss(**HOT, alpha=0.3, beta=0.7, gamma=0.75, ignore_index=1),
    "dice_ce": lambda: DiceCELoss(**HOT),
    "dice_ce options": lambda: DiceCELoss(
        **HOT,
        weight=[0.2, 0.3, 0.5],
        label_smoothing=0.1,
        lambda_dice=0.4,
        ignore_index=2,
        include_background=False,
    ),
    "mcc": lambda: MCCLoss(**HOT, batch=True),
    "focal": lambda: FocalLoss(to_onehot_y=True, alpha=0.3, weight=[0.2, 0.3, 0.5]),
    "focal values": lambda: FocalLoss(use_softmax=True, ignore_index=1, reduction="sum"),
    "focal map": lambda: FocalLoss(to_onehot_y=True, reduction="none"),
    "dice_focal": lambda: DiceFocalLoss(**HOT),
    "dice_focal options": lambda: DiceFocalLoss(
        **HOT, use_softmax=True, alpha=[0.3, 0.7], lambda_focal=0.4, include_background=False
    ),
    "generalized_focal": lambda: GeneralizedDiceFocalLoss(**HOT, ignore_index=0),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code from before; any recompilation is an error."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def data(name, seed=0):
    logits = make_logits(SHAPE, seed=seed)
    if "values" in name:
        return logits, make_values(SHAPE, seed=seed)
    return logits, make_labels((SHAPE[0], 1, *SHAPE[2:]), SHAPE[1], seed=seed)


def bits(loss, logits, target, **more):
    """Value, and the gradient of the values' sum."""
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, target, **more)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def assert_same(got, expected):
    for ours, eager in zip(got, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (eager.shape, eager.dtype, eager.stride())
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", MODULES)
def test_modules_give_the_bits_of_eager_and_never_recompile(name):
    loss = MODULES[name]()
    fast = compiled(loss)
    for seed in range(3):
        logits, target = data(name, seed)
        assert_same(bits(fast, logits, target), bits(loss, logits, target))
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        assert torch.equal(fast(logits, target), loss(logits, target))


@pytest.mark.parametrize("name", ["dice", "dice_ce"])
def test_each_backend_can_be_forced_under_compile(name, backend):
    loss = MODULES[name]()
    logits, target = data(name)
    assert_same(bits(compiled(loss), logits, target), bits(loss, logits, target))


def test_the_forced_backend_is_the_one_that_runs():
    seen = []

    def spy(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    def op_namespaces(name):
        torch.compiler.reset()
        seen.clear()
        with dicekernels.use_backend(name):
            fast = torch.compile(MODULES["dice_ce"](), fullgraph=True, backend=aot_autograd(fw_compiler=spy))
            bits(fast, *data("dice_ce"))
        return {target.split(".")[0] for target in seen if target.startswith("dicekernels")}

    assert op_namespaces("cpu") == {"dicekernels"}
    assert op_namespaces("eager") == {"dicekernels_eager"}


def test_region_sums():
    mask = make_mask("fraction", SHAPE)

    def score(logits, labels):
        sums = region_sums(logits, labels, voxel_term="ce", mask=mask)
        return 1 - (5 * sums.I / (5 * sums.I + sums.FP + 4 * sums.FN)).mean() + (sums.POS / sums.N).sum()

    fast = compiled(score)
    for seed in range(3):
        assert_same(bits(fast, *data("labels", seed)), bits(score, *data("labels", seed)))


@pytest.mark.parametrize("kind", ["binary", "fraction"])
def test_a_masked_label_map(kind):
    loss = MaskedDiceLoss(**HOT)
    fast = compiled(loss)
    for seed in range(2):
        logits, target = data("labels", seed)
        mask = make_mask(kind, SHAPE, seed=seed)
        mask = mask.bool() if kind == "binary" else mask / 2
        for got, truth in zip(
            bits(fast, logits, target, mask=mask), bits(loss, logits, target, mask=mask), strict=True
        ):
            # its formula is traced, and may be ordered anew
            assert (got - truth).abs().max() <= 4 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_a_mask_of_voxel_weights():
    loss = DiceCELoss(**HOT)
    fast = compiled(loss)
    for seed in range(2):
        logits, target = data("labels", seed)
        mask = make_mask("fraction", SHAPE, seed=seed)
        assert_same(bits(fast, logits, target, mask=mask), bits(loss, logits, target, mask=mask))


@pytest.mark.parametrize("kind", [DiceCELoss, DiceFocalLoss, GeneralizedDiceFocalLoss])
def test_a_warm_up_of_the_factors_recompiles_nothing(kind):
    loss = kind(**HOT)
    first, second = kind.FACTORS
    fast = compiled(loss)
    logits, target = data("dice_ce")
    values = []
    for step in range(4):
        setattr(loss, first, 0.25 * step)
        setattr(loss, second, 1 - 0.25 * step)
        assert_same(bits(fast, logits, target), bits(loss, logits, target))
        values.append(fast(logits.requires_grad_(), target).item())
    assert len(set(values)) == 4  # it follows
    if kind is GeneralizedDiceFocalLoss:
        return
    setattr(loss, first, 1.0)
    setattr(loss, second, 0.0)
    alone = DiceLoss(**HOT)(logits.detach(), target)
    assert fast(logits.requires_grad_(), target).item() == alone.item()


def test_factors_as_tensors_recompile_nothing():
    def loss(logits, labels, factor):
        return dicekernels.functional.dice_ce_loss(logits, labels, lambda_ce=factor, **HOT)

    fast = compiled(loss)
    for value in (0.0, 0.5, 2.0):
        factor = torch.tensor(value, dtype=torch.float64)
        logits, target = data("dice_ce")
        assert_same(
            bits(lambda z, y, f=factor: fast(z, y, f), logits, target),
            bits(loss, logits, target, factor=factor),
        )


def test_class_weights_may_change_in_place():
    loss = DiceCELoss(**HOT, weight=torch.tensor([0.2, 0.3, 0.5]))
    fast = compiled(loss)
    logits, target = data("dice_ce")
    first = bits(fast, logits, target)
    assert_same(first, bits(loss, logits, target))
    loss.cross_entropy.weight.mul_(2)
    second = bits(fast, logits, target)
    assert_same(second, bits(loss, logits, target))
    assert first[0] != second[0]


def test_an_option_changed_after_construction_takes_effect():
    loss = DiceLoss(**HOT)
    fast = compiled(loss)
    logits, target = data("dice")
    before = bits(fast, logits, target)
    loss.include_background = False
    with torch._dynamo.config.patch(error_on_recompile=False):
        after = bits(fast, logits, target)
    assert_same(after, bits(loss, logits, target))
    assert before[0] != after[0]


def test_patches_of_every_size_share_two_graphs():
    """One for the first size, one with symbols for all others (of more than one chunk of 4096 voxels)."""
    loss = DiceCELoss(**HOT)
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=False):
        for space in [(17, 16, 18), (20, 21, 22), (19, 23, 17), (31, 16, 12), (24, 24, 24)]:
            logits, labels = make_logits((2, 3, *space)), make_labels((2, 1, *space), 3)
            assert_same(bits(fast, logits, labels), bits(loss, logits, labels))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_a_dimension_marked_dynamic_stays_so():
    loss = DiceCELoss(**HOT)
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits, labels = make_logits((2, 3, 4, 5, 6)), make_labels((2, 1, 4, 5, 6), 3)
    for tensor in (logits, labels):
        torch._dynamo.mark_dynamic(tensor, 2)
    assert torch.equal(fast(logits, labels), loss(logits, labels))


def test_one_channel_compiles_though_it_warns_in_eager():
    logits, target = make_logits((2, 1, 4, 5, 6)), make_values((2, 1, 4, 5, 6))
    loss = DiceCELoss(softmax=True, include_background=False)
    with pytest.warns(UserWarning, match="single channel prediction"):
        expected = loss(logits, target)
    assert torch.equal(compiled(loss)(logits, target), expected)


def test_labels_out_of_range_are_an_error_there_too():
    fast = compiled(DiceCELoss(**HOT))
    logits, target = data("dice_ce")
    bits(fast, logits, target)
    target[0, 0, 0, 0, 0] = 200
    with pytest.raises(
        RuntimeError, match=r"1 of 240 voxels hold a label outside \[0, 3\), the first is 200"
    ):
        fast(logits.requires_grad_(), target)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, 3, 3, padding=1)
    )


def train(step, parameters):
    """Losses of three steps of gradient descent."""
    optimizer, losses = torch.optim.SGD(parameters, lr=0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = step()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_network_with_its_loss_in_one_graph():
    images, labels = make_logits((2, 1, 8, 9, 10)), make_labels((2, 1, 8, 9, 10), 3)
    runs = []
    for wrap in (lambda f: f, compiled):
        model, loss = network(), DiceCELoss(**HOT)
        step = wrap(lambda x, y, m=model, f=loss: f(m(x), y))
        runs.append(train(lambda s=step: s(images, labels), model.parameters()))
    assert runs[0] == runs[1]
    assert runs[0][2] < runs[0][0]


def test_inductor(backend):
    for name in ("dice_ce", "generalized"):
        torch.compiler.reset()
        loss = MODULES[name]()
        fast = compiled(loss, backend="inductor")
        for seed in range(2):
            assert_same(bits(fast, *data(name, seed)), bits(loss, *data(name, seed)))
