"""Random problems against the installed MONAI: values, gradients, shapes, dtypes, errors, warnings.

A failure names its seeds; ``python tests/test_monai_differential.py SEED`` runs one again.
``DICEKERNELS_FIRST_SEED`` moves the sweep to other problems.

Truth is MONAI in float64 on the same values, with its float32 one-hot widened (its norms round to
float32). For float64 logits, where MONAI would be judge of its own rounding, and for generalized Dice,
whose weights it rounds to float32, truth is the oracle, which must agree with MONAI to float32.
Honest is MONAI in the same dtype. For half precision inputs it is MONAI in float32 on them
(dicekernels/testing.py); only an ``other_act`` works in half precision.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import monai.losses
import monai.losses.dice
import monai.losses.tversky
import pytest
import torch
from monai.networks import one_hot
from monai_problems import Problem, problem
from torch import Tensor

import dicekernels
from dicekernels import reference
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

FIRST_SEED = int(os.environ.get("DICEKERNELS_FIRST_SEED", "0"))
CHUNK = 128
CPU_CHUNKS = 24
EAGER_CHUNKS = 4
F32, F64 = torch.float32, torch.float64
HALVES = (torch.float16, torch.bfloat16)

ORACLES: dict[str, Callable[..., Tensor]] = {
    "DiceLoss": reference.dice_loss,
    "GeneralizedDiceLoss": reference.generalized_dice_loss,
    "TverskyLoss": reference.tversky_loss,
    "DiceCELoss": reference.dice_ce_loss,
}


@dataclass
class Outcome:
    """What came of one call: loss and gradient, or the error; and the warnings."""

    loss: Tensor | None = None
    gradient: Tensor | None = None
    error: Exception | None = None
    warned: list[str] = field(default_factory=list)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        assert self.loss is not None and self.gradient is not None, f"raised {self.error!r}"
        return self.loss, self.gradient


def evaluate(build: Callable[[], Callable[..., Tensor]], logits: Tensor, target: Tensor) -> Outcome:
    """Builds a loss and takes its value and gradient, for a cotangent that every dtype holds exactly."""
    outcome = Outcome()
    logits = logits.detach().requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loss = build()(logits, target)
            steps = torch.arange(loss.numel(), dtype=F64).reshape(loss.shape)
            cotangent = (8 + steps % 9) / 8
            (outcome.gradient,) = torch.autograd.grad(
                loss, logits, cotangent.to(loss.dtype), materialize_grads=True
            )
            outcome.loss = loss.detach()
        except Exception as error:
            outcome.error = error
    outcome.warned = sorted(f"{w.category.__name__}: {w.message}" for w in caught)
    return outcome


@contextlib.contextmanager
def float64_one_hot() -> Iterator[None]:
    wide = partial(one_hot, dtype=F64)
    with (
        mock.patch.object(monai.losses.dice, "one_hot", wide),
        mock.patch.object(monai.losses.tversky, "one_hot", wide),
    ):
        yield


def converted(p: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, target and options with every value in ``dtype``; label maps stay as they are."""
    options = dict(p.options)
    weight = options.get("weight")
    if weight is not None:
        options["weight"] = torch.as_tensor(weight).to(dtype)
    values = p.target.shape == p.logits.shape or not p.options["to_onehot_y"]
    return p.logits.to(dtype), p.target.to(dtype) if values else p.target, options


def monai_in(p: Problem, dtype: torch.dtype) -> Outcome:
    return run_monai(p.loss, *converted(p, dtype))


def run_monai(loss: str, logits: Tensor, target: Tensor, options: dict[str, Any]) -> Outcome:
    with float64_one_hot() if logits.dtype == F64 else contextlib.nullcontext():
        return evaluate(lambda: getattr(monai.losses, loss)(**options), logits, target)


def run_oracle(loss: str, logits: Tensor, target: Tensor, options: dict[str, Any]) -> Outcome:
    return evaluate(lambda: partial(ORACLES[loss], **options), logits, target)


def widened(p: Problem, truth: Outcome, honest: Outcome) -> Outcome:
    """The larger error, place by place, of honest and of three more honest runs: of the same voxels in
    another order, with values that differ by at most one unit in the last place."""
    loss, gradient = (x.to(F64) for x in honest.pair)
    dtype = F32 if p.logits.dtype in HALVES else p.logits.dtype
    logits, target, options = converted(p, dtype)
    run = run_oracle if dtype == F64 and p.loss == "GeneralizedDiceLoss" else run_monai
    for draw in range(3):
        generator = torch.Generator().manual_seed(draw)
        order = torch.randperm(logits.shape[2:].numel(), generator=generator)

        def moved(x: Tensor, order: Tensor = order, generator: torch.Generator = generator) -> Tensor:
            shuffled = x.reshape(*x.shape[:2], -1)[..., order].reshape(x.shape)
            if not x.is_floating_point() or x.shape != logits.shape:
                return shuffled
            ulps = torch.randint(-1, 2, x.shape, generator=generator)
            return shuffled * (1 + ulps * torch.finfo(x.dtype).eps)

        other_loss, other = run(p.loss, moved(logits), moved(target), options).pair
        back = torch.empty_like(other).reshape(*logits.shape[:2], -1)
        back[..., order] = other.reshape(back.shape)
        for most, exact, value in (
            (loss, truth.pair[0], other_loss),
            (gradient, truth.pair[1], back.reshape(logits.shape)),
        ):
            worse = (value - exact).abs() > (most - exact).abs()
            most[worse] = value[worse].to(F64)
    return Outcome(loss, gradient)


def ours(p: Problem, backend: str) -> Outcome:
    """On one backend; without spatial dims (B, C) the dense oracle runs, and no kernel can be forced."""
    forced = contextlib.nullcontext() if p.logits.ndim == 2 else dicekernels.use_backend(backend)
    with forced:
        return evaluate(lambda: getattr(dicekernels, p.loss)(**p.options), p.logits, p.target)


def accident(p: Problem) -> type[Exception] | None:
    """What ours raises where MONAI broadcasts, or fails to, what nobody asked it to."""
    shape, target = p.logits.shape, p.target.shape
    if p.loss == "TverskyLoss" and "ignore_index" in p.options and p.flaw in ("space", "samples", "channels"):
        # It multiplies by the ignore mask before it compares the shapes.
        labels = p.options["to_onehot_y"] and shape[1] > 1
        fits = (shape[0], 1, *shape[2:]) if labels else shape
        return None if target == fits else AssertionError
    weight = p.options.get("weight")
    if p.loss == "DiceCELoss" and shape[1] == 1 and weight is not None and weight.numel() != 1:
        # BCE broadcasts a positive weight of the wrong length over the last spatial axis.
        return RuntimeError
    return None


def check(p: Problem, backend: str) -> bool:
    """Ours against MONAI on one problem; True if it took more than one honest run (``compare``)."""
    theirs = evaluate(lambda: getattr(monai.losses, p.loss)(**p.options), p.logits, p.target)
    got = ours(p, backend)
    refusal = accident(p)
    if refusal is not None:
        assert isinstance(got.error, refusal), f"expected {refusal.__name__}, got {got.error or got.loss!r}"
        return False
    wide = monai_in(p, F64)
    if theirs.error is not None and (wide.error is not None or got.error is not None):
        # With two faults MONAI names the dtype first; in float64 the other is left.
        kinds = (type(theirs.error), *([type(wide.error)] if wide.error is not None else []))
        assert isinstance(got.error, kinds), f"MONAI raised {theirs.error!r}, ours {got.error or got.loss!r}"
        return False
    refused = theirs.error is not None
    if refused:
        # MONAI refuses no more than the mix of dtypes; the number is that of float64.
        theirs = monai_in(p, p.logits.dtype if p.logits.dtype == F64 else F32)
    assert got.error is None, f"ours raised {got.error!r}, MONAI gives {theirs.loss}"
    assert got.warned == theirs.warned, f"warnings: ours {got.warned}, MONAI's {theirs.warned}"
    loss, gradient = got.pair
    expected = p.logits.dtype if refused else theirs.pair[0].dtype
    assert loss.dtype == expected or (refused and loss.dtype == F32), (
        f"dtype: {loss.dtype}, MONAI's {expected}"
    )
    assert loss.shape == theirs.pair[0].shape
    assert gradient.dtype == p.logits.dtype and gradient.shape == p.logits.shape
    return compare(p, got, theirs, wide)


def compare(p: Problem, got: Outcome, theirs: Outcome, wide: Outcome) -> bool:
    """Loss and gradient within the bounds of dicekernels/testing.py.

    Returns:
        Whether it took more than one honest run: a single one may be right by luck, on a problem of one
        voxel or one that magnifies the last bit.
    """
    dtype = p.logits.dtype
    truth, honest = wide, theirs
    if p.loss == "GeneralizedDiceLoss" or dtype == F64:
        truth = run_oracle(p.loss, *converted(p, F64))
        # MONAI's float32 weights: G, G * G and the inverse round by eps / 2 each.
        for exact, value in zip(truth.pair, wide.pair, strict=True):
            assert_close_to_truth(beside_one(value), beside_one(exact), beside_one(exact), F32, "oracle")
    if dtype in HALVES and "other_act" not in p.options:
        honest = monai_in(p, F32)
    elif dtype == F64 and p.loss == "GeneralizedDiceLoss":
        honest = truth
    try:
        within_bounds(p, got, truth, honest)
    except AssertionError:
        within_bounds(p, got, truth, widened(p, truth, honest))
        return True
    return False


def within_bounds(p: Problem, got: Outcome, truth: Outcome, honest: Outcome) -> None:
    dtype, (loss, gradient) = p.logits.dtype, got.pair
    ignored = ignored_voxels(p)
    assert not (loss.isfinite().all() and gradient[ignored].any()), "an ignored voxel has a gradient"
    losses = [loss, held(truth.pair[0], loss.dtype), honest.pair[0].to(loss.dtype)]
    slopes = [gradient, held(truth.pair[1], dtype), honest.pair[1].to(dtype)]
    slopes = [x.masked_fill(ignored, 0) for x in slopes]
    if dtype == F64:
        # The 1 sets the scale: MONAI subtracts a ratio from 1, and what is left may be less than its error.
        losses, slopes = [beside_one(x) for x in losses], [beside_one(x) for x in slopes]
    inner = dtype if dtype == F64 or (dtype in HALVES and "other_act" in p.options) else F32
    coarser = max(loss.dtype, inner, key=lambda kind: torch.finfo(kind).eps)
    assert_close_to_truth(losses[0], losses[1], losses[2], coarser, "loss")
    # Between 0 and its smallest number a dtype holds no direction.
    largest = slopes[1][slopes[1].isfinite()].abs().amax().item() if slopes[1].isfinite().any() else 0.0
    whole = largest > 64 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    (assert_gradient_close if whole else assert_close_to_truth)(
        slopes[0], slopes[1], slopes[2], dtype, "gradient"
    )


def held(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """The truth in float64, infinite where it is beyond the range of dtype."""
    rounded = truth.to(dtype).to(F64)
    return torch.where(rounded.isinf(), rounded, truth.to(F64))


def beside_one(x: Tensor) -> Tensor:
    return torch.cat([x.flatten().to(F64), torch.ones(1, dtype=F64)])


def ignored_voxels(p: Problem) -> Tensor:
    """Where the gradient is 0 here, and NaN in MONAI if the loss is infinite."""
    index = p.options.get("ignore_index")
    if index is None:
        return torch.zeros(p.logits.shape, dtype=torch.bool)
    return (reference.ignore_mask(p.target, index) == 0).expand(p.logits.shape)


def sweep(first: int, backend: str) -> None:
    failures, lucky = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the volumes are small
    try:
        for seed in range(first, first + CHUNK):
            p = problem(seed)
            try:
                if check(p, backend):
                    lucky.append(seed)
            except Exception as error:
                failures.append(f"{p}\n    {type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(threads)
    assert not failures, f"{len(failures)} of {CHUNK} problems fail on {backend}:\n" + "\n".join(failures[:6])
    assert len(lucky) <= 1, f"MONAI's error is often smaller by luck than ours: seeds {lucky}"


@pytest.mark.parametrize("chunk", range(CPU_CHUNKS))
def test_kernels_give_monais_results(chunk: int) -> None:
    reason = dicekernels.available_backends()["cpu"]
    if reason:
        pytest.skip(f"backend 'cpu': {reason}")
    sweep(FIRST_SEED + chunk * CHUNK, "cpu")


@pytest.mark.parametrize("chunk", range(EAGER_CHUNKS))
def test_eager_gives_monais_results(chunk: int) -> None:
    sweep(FIRST_SEED + 1_000_000 + chunk * CHUNK, "eager")


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        print(problem(number))
        for name in ("cpu", "eager"):
            again = " (not on the first honest run)" if check(problem(number), name) else ""
            print(f"  {name}: as MONAI{again}")
