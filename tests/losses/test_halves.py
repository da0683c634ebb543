"""Losses of two halves: the sum of these halves to the last bit, and lambdas that are what the user sets."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dicekernels
from dicekernels import functional, testing

F32, F64 = torch.float32, torch.float64
PAIRS = {
    "DiceFocalLoss": (dicekernels.DiceLoss, "lambda_dice"),
    "GeneralizedDiceFocalLoss": (dicekernels.GeneralizedDiceLoss, "lambda_gdl"),
}
COMPOUNDS = {"DiceCELoss": ("lambda_dice", "lambda_ce")} | {
    name: (first, "lambda_focal") for name, (_, first) in PAIRS.items()
}
HOT = {"to_onehot_y": True, "softmax": True}


class HalvesProblem:
    """A random problem of MONAI's own tests of DiceFocalLoss, and beyond: everything by one seed."""

    def __init__(self, seed: int, dtype: torch.dtype = F32) -> None:
        g = torch.Generator().manual_seed(seed)

        def pick(*choices: Any) -> Any:
            return choices[int(torch.randint(len(choices), (), generator=g))]

        classes = pick(1, 2, 3, 4, 7)
        space = tuple(int(torch.randint(1, 9, (), generator=g)) for _ in range(pick(1, 2, 3)))
        self.logits = (2 * torch.randn(pick(1, 3), classes, *space, generator=g)).to(dtype)
        shape = (self.logits.shape[0], 1, *space)
        self.dense = classes == 1 or pick(False, True)
        if self.dense:
            self.target = pick(
                torch.randint(0, 2, self.logits.shape, generator=g),
                torch.rand(self.logits.shape, generator=g).to(dtype),
            )
        else:
            self.target = torch.randint(0, classes, shape, generator=g)
        # Most numbers are none of float32, which torch rounds them to.
        random = 3 * torch.rand(2, generator=g, dtype=F64)
        self.lambdas = tuple(pick(0.5, 1.0, 1.5, float(value)) for value in random)
        background = pick(True, False)
        kept = classes if background or classes == 1 else classes - 1
        weight = pick(None, 2.0, torch.rand(kept, generator=g)) if kept > 1 else None
        self.common: dict[str, Any] = {
            "include_background": background,
            "to_onehot_y": not self.dense,
            "reduction": pick("mean", "sum"),
        }
        # A softmax of one channel is ignored, and sums of raw logits cancel.
        activation = pick({"softmax": True}, {"sigmoid": True}, {"other_act": torch.tanh})
        activation = {"sigmoid": True} if classes == 1 else activation
        self.overlap: dict[str, Any] = {"batch": pick(False, True), **activation}
        self.weight = weight
        # For soft targets an alpha of each class has no kernel.
        alphas = None if self.target.is_floating_point() else torch.rand(kept, generator=g)
        self.focal: dict[str, Any] = {"gamma": pick(0.5, 1.0, 2.0), "alpha": pick(None, 0.25, alphas)}
        self.ignore_index = pick(None, None, 255 if not self.dense else None)
        if self.ignore_index is not None:
            self.target[torch.rand(shape, generator=g) < 0.2] = 255

    def whole_and_halves(self, name: str) -> tuple[Tensor, Tensor]:
        kind, first = PAIRS[name]
        common = self.common | {"ignore_index": self.ignore_index}
        dice = self.overlap | ({"weight": self.weight} if name == "DiceFocalLoss" else {})
        a, b = self.lambdas
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = getattr(dicekernels, name)(
                **common, **self.overlap, **self.focal, weight=self.weight, **{first: a, "lambda_focal": b}
            )
            overlap = kind(**common, **dice)
            focal = dicekernels.FocalLoss(**common, **self.focal, weight=self.weight, mean_over_classes=True)
            tensors = (self.logits, self.target)
            return whole(*tensors), a * overlap(*tensors) + b * focal(*tensors)


@pytest.mark.parametrize("name", PAIRS)
def test_the_focal_losses_are_their_halves_to_the_last_bit(backend, name):
    for seed in range(12 if backend == "triton" else 120):
        whole, halves = HalvesProblem(seed).whole_and_halves(name)
        # A GPU has kernels of its own for one half and for both, whose sums differ in their last bits.
        apart = 0 if backend in ("cpu", "eager") else 2 * torch.finfo(F32).eps
        assert abs(whole - halves) <= apart * abs(halves), f"seed {seed}: {whole} and {halves}"


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_ten_thousand_problems_at_the_tolerance_of_monais_own_tests(name):
    for seed in range(10_000):
        whole, halves = HalvesProblem(1_000_000 + seed).whole_and_halves(name)
        # numpy's default of assert_allclose, which MONAI's tests of this identity have
        assert abs(whole - halves) <= 1e-7 * abs(halves), f"seed {seed}: {whole} and {halves}"


def test_cross_entropy_and_dice_are_the_loss_of_each_alone_to_the_last_bit(backend):
    for seed in range(12 if backend == "triton" else 120):
        p = HalvesProblem(seed)
        weight = None if p.weight is None else torch.rand(p.logits.shape[1])
        options = p.common | p.overlap | {"weight": weight, "ignore_index": p.ignore_index}
        a, b = p.lambdas
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole, dice, ce = (
                functional.dice_ce_loss(p.logits, p.target, **options, lambda_dice=x, lambda_ce=y)
                for x, y in ((a, b), (a, 0.0), (0.0, b))
            )
        assert torch.equal(whole, dice + ce), f"seed {seed}: {whole} and {dice + ce}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F64])
def test_halves_are_rounded_to_the_dtype_of_the_loss(backend, dtype):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, 5, generator=generator).to(dtype)
    target = torch.rand(2, 3, 4, 5, generator=generator).to(dtype)
    options = {"softmax": True}
    whole, dice, ce = (
        functional.dice_ce_loss(logits, target, **options, lambda_dice=x, lambda_ce=y)
        for x, y in ((0.7, 1.3), (1.0, 0.0), (0.0, 1.0))
    )
    assert whole.dtype == dtype
    assert torch.equal(whole, 0.7 * dice + 1.3 * ce)


def test_the_gradient_knows_nothing_of_the_rounding(backend):
    logits, labels = data()
    loss = dicekernels.DiceFocalLoss(**HOT, lambda_dice=0.3, lambda_focal=0.7)
    exact = torch.autograd.grad(loss(logits, labels), logits)[0]
    for create_graph in (False, True):  # the kernels, and PyTorch's own graph of the formulas
        z = logits.detach().float().requires_grad_()
        gradient = torch.autograd.grad(loss(z, labels), z, create_graph=create_graph)[0].detach()
        testing.assert_gradient_close(gradient, exact, exact, F32, f"create_graph={create_graph}")


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, dtype=F64, generator=generator)
    return logits.requires_grad_(), torch.randint(3, (2, 1, 4, 5, 6), generator=generator)


def test_halves_that_have_no_kernel_together():
    """An ignored class of fractions beside voxel weights, logits without a space, an alpha of each class."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        z, g = torch.randn(2, 3, 7, generator=generator), torch.rand(2, 3, 7, generator=generator)
        m = torch.rand(2, 1, 7, generator=generator)
        for tensors, more in (((z, g), {"mask": m}), ((z[..., 0], g[..., 0]), {})):
            options = {"ignore_index": 0 if more else None}
            whole = dicekernels.DiceFocalLoss(softmax=True, lambda_focal=0.7, **options)(*tensors, **more)
            dice = dicekernels.DiceLoss(softmax=True, **options)(*tensors, **more)
            focal = dicekernels.FocalLoss(mean_over_classes=True, **options)(*tensors, **more)
            assert torch.equal(whole, dice + 0.7 * focal)
        alpha = torch.rand(3, generator=generator)
        whole = dicekernels.DiceFocalLoss(softmax=True, alpha=alpha, lambda_dice=0.3)(z, g)
        halves = dicekernels.DiceLoss(softmax=True)(z, g), dicekernels.FocalLoss(alpha=alpha)(z, g)
        assert torch.equal(whole, 0.3 * halves[0] + halves[1])


every_compound = pytest.mark.parametrize("name", COMPOUNDS)


@every_compound
def test_a_lambda_is_what_was_set(name):
    loss = getattr(dicekernels, name)(**HOT)
    for value in (0.7, 2, torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float16)):
        for key in COMPOUNDS[name]:
            setattr(loss, key, value)
            assert getattr(loss, key) is value
    assert list(loss.buffers()) == list(loss.parameters()) == []
    assert list(loss.state_dict()) == []


@every_compound
def test_a_learned_lambda_has_monais_key(name):
    for key in COMPOUNDS[name]:
        factor = nn.Parameter(torch.tensor(0.3, dtype=F64))
        loss = getattr(dicekernels, name)(**HOT, **{key: factor})
        assert getattr(loss, key) is factor
        assert [k for k, _ in loss.named_parameters()] == list(loss.state_dict()) == [key]
        loss.load_state_dict({key: torch.tensor(0.875)})
        assert factor.item() == 0.875
        logits, labels = data()
        loss(logits, labels).backward()
        with torch.no_grad():
            slope = loss(logits, labels)
            setattr(loss, key, 0.0)
            slope = (slope - loss(logits, labels)) / 0.875
        assert factor.grad.item() == pytest.approx(slope.item(), abs=1e-12)
        assert list(loss.parameters()) == []


@every_compound
def test_a_copy_has_lambdas_of_its_own(name):
    logits, labels = data()
    for factor in (0.25, nn.Parameter(torch.tensor(0.25))):
        key = COMPOUNDS[name][1]
        loss = getattr(dicekernels, name)(**HOT, **{key: factor})
        before = loss(logits, labels).item()
        for duplicate in (copy.copy(loss), copy.deepcopy(loss)):
            setattr(duplicate, key, 3.0)
            assert duplicate(logits, labels).item() != before
            assert loss(logits, labels).item() == before
            fast = torch.compile(loss, fullgraph=True, backend="eager")
            assert fast(logits, labels).item() == pytest.approx(before, abs=1e-12)


@every_compound
def test_lambdas_keep_their_value_in_any_cast(name):
    """What FSDP's buffer_dtype does to every buffer, and ``half`` to every tensor of a module."""
    logits, labels = data()
    key = COMPOUNDS[name][0]
    loss = getattr(dicekernels, name)(**HOT, **{key: 0.7})
    before = loss(logits, labels).item()
    for buffer in loss.buffers():
        buffer.data = buffer.to(torch.bfloat16)
    loss.to(torch.bfloat16)
    assert getattr(loss, key) == 0.7
    assert loss(logits, labels).item() == before
    assert torch.compile(loss, fullgraph=True, backend="eager")(logits, labels).item() == before


def test_a_lambda_as_a_property_is_followed():
    class Scheduled(dicekernels.DiceCELoss):
        step = 0

        @property
        def lambda_ce(self) -> float:
            return 0.25 * self.step

        @lambda_ce.setter
        def lambda_ce(self, value: float) -> None:
            """The constructor's value is not the schedule's."""

    logits, labels = data()
    loss = Scheduled(**HOT)
    for step in range(3):
        loss.step = step
        truth = dicekernels.DiceCELoss(**HOT, lambda_ce=0.25 * step)
        assert loss(logits, labels).item() == truth(logits, labels).item()
        torch.compiler.reset()
        fast = torch.compile(loss, fullgraph=True, backend="eager")
        assert fast(logits, labels).item() == truth(logits, labels).item()


RANKS = """
import sys
import torch
import torch.distributed as dist
from torch import nn
import dicekernels

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Conv3d(1, 3, 1)
        self.loss = dicekernels.DiceCELoss(to_onehot_y=True, softmax=True, lambda_ce=0.5 + rank)

    def forward(self, x, y):
        return self.loss(self.network(x), y)


step = nn.parallel.DistributedDataParallel(Step())
x, y = torch.randn(1, 1, 4, 4, 4), torch.randint(3, (1, 1, 4, 4, 4))
step(x, y).backward()
assert step.module.loss.lambda_ce == 0.5 + rank, step.module.loss.lambda_ce
if rank == 0:
    with torch.no_grad():
        alone = step(x, y).item()  # buffers would be broadcast by every forward
    assert alone > 0
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_a_rank_has_lambdas_of_its_own_and_may_validate_alone(tmp_path: Path) -> None:
    code = tmp_path / "ranks.py"
    code.write_text(RANKS)
    command = [sys.executable, str(code)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            out, error = rank.communicate(timeout=120)
            assert rank.returncode == 0, error.decode()
            assert out.split()[-1] == b"done"
    finally:
        for rank in ranks:
            rank.kill()


def test_a_compiled_loss_reads_the_lambda_that_is_there():
    logits, labels = data()
    loss = dicekernels.DiceCELoss(**HOT)
    del loss.lambda_ce
    with pytest.raises((AttributeError, torch._dynamo.exc.Unsupported), match="lambda_ce"):
        torch.compile(loss, fullgraph=True, backend="eager")(logits, labels)
    factor = nn.Parameter(torch.tensor(0.2, dtype=F64))
    loss.register_parameter("lambda_ce", factor)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")(logits, labels)
    assert torch.equal(compiled, loss(logits, labels))
    compiled.backward()
    assert factor.grad != 0

    class Fixed(dicekernels.DiceCELoss):
        lambda_ce = 0.5

    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        loss = Fixed(**HOT)
        fast = torch.compile(loss, fullgraph=True, backend="eager")
        for value in (0.25, 0.75, 2.0):
            loss.lambda_ce = value
            assert fast(logits, labels).item() == loss(logits, labels).item()


def test_a_negative_lambda_is_refused_also_as_a_tensor():
    for value in (-1.0, torch.tensor(-1.0), nn.Parameter(torch.tensor(-1.0))):
        with pytest.raises(ValueError, match="lambda_ce should be no less than 0.0"):
            dicekernels.DiceCELoss(lambda_ce=value)


def test_a_copy_may_learn_its_lambda_alone():
    loss = dicekernels.DiceCELoss(**HOT)
    copied = copy.copy(loss)
    copied.lambda_ce = nn.Parameter(torch.tensor(0.5))
    assert loss.lambda_ce == 1.0 and list(loss.parameters()) == []
