"""How a problem of ``monai_problems`` is run in MONAI and here, and what the results are held against.

Truth is MONAI in float64 on the same values, with what it casts to float32 widened (its one-hot, the
``.float()`` of its focal losses and masks). For float64 logits, where MONAI would be judge of its own
rounding, and for generalized Dice, whose weights it rounds to float32, truth is the oracle, which must agree
with MONAI to float32. Honest is MONAI in the same dtype. For half precision inputs it is MONAI in float32 on
them (dicekernels/testing.py); only an ``other_act`` works in half precision.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import monai.losses
import torch
from monai.networks import one_hot
from monai_problems import MonaiProblem
from torch import Tensor

import dicekernels
from dicekernels import reference
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

F32, F64 = torch.float32, torch.float64
HALVES = (torch.float16, torch.bfloat16)
ONE_HOTS = ("dice", "tversky", "focal_loss", "mcc_loss", "unified_focal_loss")

ORACLES: dict[str, Callable[..., Tensor]] = {
    "DiceLoss": reference.dice_loss,
    "GeneralizedDiceLoss": reference.generalized_dice_loss,
    "TverskyLoss": reference.tversky_loss,
    "DiceCELoss": reference.dice_ce_loss,
    "FocalLoss": reference.focal_loss,
    "DiceFocalLoss": reference.dice_focal_loss,
    "GeneralizedDiceFocalLoss": reference.generalized_dice_focal_loss,
    "MaskedDiceLoss": reference.masked_dice_loss,
    "MCCLoss": reference.mcc_loss,
    "GeneralizedWassersteinDiceLoss": reference.generalized_wasserstein_dice_loss,
    "AsymmetricUnifiedFocalLoss": reference.asymmetric_unified_focal_loss,
}
DENSE = (
    'reduction="none" of the focal loss is a map of the size of the logits',
    "an alpha of each class acts only where a soft target is 1",
    "no kernel has the sums of generalized_wasserstein_dice_loss",
    "no kernel has the sums of asymmetric_unified_focal_loss",
)
FOCAL = ("FocalLoss", "DiceFocalLoss", "GeneralizedDiceFocalLoss")
GENERALIZED = ("GeneralizedDiceLoss", "GeneralizedDiceFocalLoss")


@dataclass
class Outcome:
    """What came of one call: loss and gradient (of all outputs in a row), or the error; and the warnings."""

    loss: Tensor | None = None
    gradient: Tensor | None = None
    error: Exception | None = None
    warned: list[str] = field(default_factory=list)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        assert self.loss is not None and self.gradient is not None, f"raised {self.error!r}"
        return self.loss, self.gradient


def evaluate(build: Callable[[], Callable[..., Tensor]], p: MonaiProblem) -> Outcome:
    """Builds a loss and takes its value and gradient, for a cotangent that every dtype holds exactly."""
    outcome = Outcome()
    leaves = [x.detach().requires_grad_() for x in (p.logits, *(p.levels or ()))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            first = leaves[0] if p.levels is None else leaves
            loss = build()(first, p.target, *([p.mask] if p.masked else []))
            steps = torch.arange(loss.numel(), dtype=F64).reshape(loss.shape)
            cotangent = (8 + steps % 9) / 8
            slopes = torch.autograd.grad(loss, leaves, cotangent.to(loss.dtype), materialize_grads=True)
            outcome.gradient = slopes[0] if p.levels is None else torch.cat([x.flatten() for x in slopes])
            outcome.loss = loss.detach()
        except Exception as error:
            outcome.error = error
    texts = sorted(f"{w.category.__name__}: {w.message}" for w in caught)
    # MONAI is silent about a focal loss that is always 0.
    outcome.warned = [text for text in texts if "a softmax over one of them" not in text]
    return outcome


def built(library: Any, p: MonaiProblem) -> Callable[..., Tensor]:
    """The loss of ``monai.losses`` or of ``dicekernels``; MaskedLoss takes a loss or its class."""
    loss = getattr(library, p.loss)
    if p.inner is None:
        return loss(**p.options)
    inner, options = getattr(library, p.inner[0]), p.inner[1]
    if p.loss == "MaskedLoss" and p.seed % 2:
        return loss(inner, **options)
    return loss(inner(**options), **p.options)


def run_monai(p: MonaiProblem) -> Outcome:
    with widened_casts() if p.logits.dtype == F64 else contextlib.nullcontext():
        return evaluate(partial(built, monai.losses, p), p)


def run_oracle(p: MonaiProblem) -> Outcome:
    return evaluate(lambda: partial(ORACLES[p.loss], **p.options), p)


def run_as_users(p: MonaiProblem) -> Outcome:
    """MONAI as it is, casts and all."""
    return evaluate(partial(built, monai.losses, p), p)


def run_ours(p: MonaiProblem, backend: str) -> Outcome:
    """On one backend; what no kernel has (``DENSE``) cannot be forced onto one and runs as users run it."""
    forced = contextlib.nullcontext() if p.logits.ndim == 2 else dicekernels.use_backend(backend)
    with forced:
        got = evaluate(partial(built, dicekernels, p), p)
    if any(f"was forced, but {reason}" in str(got.error) for reason in DENSE):
        return evaluate(partial(built, dicekernels, p), p)
    return got


@contextlib.contextmanager
def widened_casts() -> Iterator[None]:
    wide = partial(one_hot, dtype=F64)
    with contextlib.ExitStack() as stack:
        for name in ONE_HOTS:
            module = __import__(f"monai.losses.{name}", fromlist=["one_hot"])
            stack.enter_context(mock.patch.object(module, "one_hot", wide))
        stack.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
        yield


def converted(p: MonaiProblem, dtype: torch.dtype) -> MonaiProblem:
    """The problem with every value in ``dtype``; label maps stay, and masks, unless float64 would win."""

    def weighted(options: dict[str, Any]) -> dict[str, Any]:
        weight = options.get("weight")
        if weight is None or p.loss == "AsymmetricUnifiedFocalLoss":
            return dict(options)
        return {**options, "weight": torch.as_tensor(weight).to(dtype)}

    return dataclasses.replace(
        p,
        options=weighted(p.options),
        logits=p.logits.to(dtype),
        target=p.target if p.labels else p.target.to(dtype),
        mask=p.mask.to(dtype) if p.mask is not None and p.mask.dtype == F64 else p.mask,
        levels=None if p.levels is None else [level.to(dtype) for level in p.levels],
        inner=p.inner and (p.inner[0], weighted(p.inner[1])),
    )


def widened(p: MonaiProblem, truth: Outcome, honest: Outcome) -> Outcome:
    """The larger error, place by place, of honest and of three more honest runs: of the same voxels in
    another order, with values that differ by at most one unit in the last place."""
    loss, gradient = (x.to(F64, copy=True) for x in honest.pair)
    dtype = F32 if p.logits.dtype in HALVES else p.logits.dtype
    same = converted(p, dtype)
    run = run_oracle if dtype == F64 and p.loss in GENERALIZED else run_monai
    voxels = p.logits.shape[2:].numel()
    whole = p.mask is None or p.mask.shape[2:] == p.logits.shape[2:]
    for draw in range(3):
        generator = torch.Generator().manual_seed(draw)
        order = torch.randperm(voxels, generator=generator)
        if p.levels is not None or not whole:
            order = torch.arange(voxels)  # voxels of several sizes

        def shuffled(x: Tensor, order: Tensor = order) -> Tensor:
            return x.reshape(x.shape[0], -1, voxels)[..., order].reshape(x.shape)

        def moved(x: Tensor, generator: torch.Generator = generator) -> Tensor:
            if not x.is_floating_point():
                return x
            ulps = torch.randint(-1, 2, x.shape, generator=generator)
            return x * (1 + ulps * torch.finfo(x.dtype).eps)

        target = same.target if p.levels is not None else shuffled(same.target)
        other = dataclasses.replace(
            same,
            logits=moved(shuffled(same.logits)),
            target=target if p.labels else moved(target),
            mask=p.mask if p.mask is None or not whole else shuffled(p.mask),
            levels=None if same.levels is None else [moved(level) for level in same.levels],
        )
        other_loss, back = run(other).pair
        if p.levels is None:
            unsorted = torch.empty_like(back).reshape(*p.logits.shape[:2], -1)
            unsorted[..., order] = back.reshape(unsorted.shape)
            back = unsorted.reshape(p.logits.shape)
        for most, exact, value in ((loss, truth.pair[0], other_loss), (gradient, truth.pair[1], back)):
            worse = (value - exact).abs() > (most - exact).abs()
            most[worse] = value[worse].to(F64)
    return Outcome(loss, gradient)


def accident(p: MonaiProblem) -> type[Exception] | None:
    """What ours raises where MONAI broadcasts, or fails to, what nobody asked it to."""
    shape, target = p.logits.shape, p.target.shape
    deep = p.loss == "DeepSupervisionLoss" and p.own_loss == "TverskyLoss" and p.flaw == "samples"
    if deep and "ignore_index" in p.own:
        return AssertionError  # as the next
    if p.loss == "TverskyLoss" and "ignore_index" in p.options and p.flaw in ("space", "samples", "channels"):
        # It multiplies by the ignore mask before it compares the shapes.
        labels = p.options["to_onehot_y"] and shape[1] > 1
        fits = (shape[0], 1, *shape[2:]) if labels else shape
        return None if target == fits else AssertionError
    if p.loss == "MaskedDiceLoss" and p.flaw in ("space", "samples", "channels"):
        # It multiplies by the mask before it compares the shapes.
        fits = (shape[0], 1, *shape[2:]) if p.options["to_onehot_y"] and shape[1] > 1 else shape
        return None if target == fits else AssertionError
    if p.loss == "MaskedDiceLoss" and p.mask is not None and p.flaw in ("mask space", "mask dims"):
        # A mask of another size may stretch the volume, one of fewer dimensions meet the classes.
        sizes = zip(reversed(p.mask.shape), reversed((shape[0], 1, *shape[2:])), strict=False)
        return RuntimeError if p.mask.ndim > 1 and any(a not in (1, b) for a, b in sizes) else None
    if p.loss == "GeneralizedWassersteinDiceLoss" and target.numel() != shape.numel() // shape[1]:
        return RuntimeError  # its gather takes fewer labels than voxels
    if (
        p.loss == "AsymmetricUnifiedFocalLoss"
        and "ignore_index" in p.options
        and p.flaw in ("space", "samples")
    ):
        return ValueError  # as the two above
    weight = p.options.get("weight")
    if p.loss == "DiceCELoss" and shape[1] == 1 and weight is not None and weight.numel() != 1:
        # BCE broadcasts a positive weight of the wrong length over the last spatial axis.
        return RuntimeError
    return None


def resizable(p: MonaiProblem) -> MonaiProblem:
    """Integer targets that torch does not resize on the CPU, as float32 of the same values."""
    sizes = {x.shape[2:] for x in (p.logits, *(p.levels or ()))}
    if p.levels is None or p.target.is_floating_point() or sizes == {p.target.shape[2:]}:
        return p
    return p if p.target.dtype == torch.uint8 else dataclasses.replace(p, target=p.target.float())


def check(p: MonaiProblem, backend: str) -> bool:
    """Ours against MONAI on one problem; True if it took more than one honest run (``compare``)."""
    got, p = run_ours(p, backend), resizable(p)
    theirs = run_as_users(p)
    refusal = accident(p)
    if refusal is not None:
        assert isinstance(got.error, refusal), f"expected {refusal.__name__}, got {got.error or got.loss!r}"
        return False
    wide = run_monai(converted(p, F64))
    if theirs.error is not None and (wide.error is not None or got.error is not None):
        # With two faults MONAI names the dtype first; in float64 the other is left.
        kinds = (type(theirs.error), *([type(wide.error)] if wide.error is not None else []))
        assert isinstance(got.error, kinds), f"MONAI raised {theirs.error!r}, ours {got.error or got.loss!r}"
        return False
    refused = theirs.error is not None
    if refused:
        # MONAI refuses no more than the mix of dtypes; the number is that of float64.
        theirs = run_monai(converted(p, p.logits.dtype if p.logits.dtype == F64 else F32))
    assert got.error is None, f"ours raised {got.error!r}, MONAI gives {theirs.loss}"
    assert got.warned == theirs.warned, f"warnings: ours {got.warned}, MONAI's {theirs.warned}"
    loss, gradient = got.pair
    expected = theirs.pair[0].dtype
    if refused:
        mixed = p.logits.dtype if p.mask is None else torch.promote_types(p.logits.dtype, p.mask.dtype)
        expected = F32 if loss.dtype == F32 else mixed
    if p.own_loss == "DiceFocalLoss" and p.logits.ndim == 2 and theirs.pair[0].ndim:
        # There the Dice half is 0-dim and promotes no map; ours has the dtype of its other shapes.
        expected = torch.promote_types(expected, p.logits.dtype)
    assert loss.dtype == expected, f"dtype: {loss.dtype}, MONAI's {expected}"
    assert loss.shape == theirs.pair[0].shape
    assert gradient.dtype == p.logits.dtype
    assert p.levels is not None or gradient.shape == p.logits.shape
    return compare(p, got, theirs, wide)


def compare(p: MonaiProblem, got: Outcome, theirs: Outcome, wide: Outcome) -> bool:
    """Loss and gradient within the bounds of dicekernels/testing.py.

    Returns:
        Whether it took more than one honest run: a single one may be right by luck, on a problem of one
        voxel or one that magnifies the last bit.
    """
    dtype = p.logits.dtype
    truth, honest = wide, theirs
    if p.loss in ORACLES and (p.loss in GENERALIZED or dtype == F64):
        truth = run_oracle(converted(p, F64))
        # MONAI's float32 weights: G, G * G and the inverse round by eps / 2 each.
        for exact, value in zip(truth.pair, wide.pair, strict=True):
            assert_close_to_truth(beside_one(value), beside_one(exact), beside_one(exact), F32, "oracle")
    if dtype in HALVES and "other_act" not in p.own:
        honest = run_monai(converted(p, F32))
    elif dtype == F64 and p.loss == "GeneralizedDiceLoss":
        honest = truth
    elif dtype == F64 and p.own_loss in FOCAL:
        honest = wide  # MONAI's focal loss is float32 in value and gradient; ours in value alone
    try:
        within_bounds(p, got, truth, honest)
    except AssertionError:
        within_bounds(p, got, truth, widened(p, truth, honest))
        return True
    return False


def working_dtype(p: MonaiProblem) -> torch.dtype:
    """What is computed in for logits of this dtype."""
    dtype = p.logits.dtype
    if p.loss == "DeepSupervisionLoss":
        return F32  # of float64 outputs, too, it makes float32
    return dtype if dtype == F64 or (dtype in HALVES and "other_act" in p.own) else F32


def within_bounds(p: MonaiProblem, got: Outcome, truth: Outcome, honest: Outcome) -> None:
    dtype, (loss, gradient) = p.logits.dtype, got.pair
    ignored = ignored_voxels(p)
    assert not (loss.isfinite().all() and gradient[ignored].any()), "an ignored voxel has a gradient"
    losses = [loss, held(truth.pair[0], loss.dtype), honest.pair[0].to(loss.dtype)]
    slopes = [gradient, held(truth.pair[1], dtype), honest.pair[1].to(dtype)]
    slopes = [x.masked_fill(ignored, 0) for x in slopes]
    if dtype == F64:
        # The 1 sets the scale: MONAI subtracts a ratio from 1, and what is left may be less than its error.
        losses, slopes = [beside_one(x) for x in losses], [beside_one(x) for x in slopes]
    eps = torch.finfo
    value = F32 if p.own_loss in FOCAL else loss.dtype  # the focal half is rounded before it is added
    coarser = max(loss.dtype, value, working_dtype(p), key=lambda kind: eps(kind).eps)
    assert_close_to_truth(losses[0], losses[1], losses[2], coarser, "loss")
    # Between 0 and its smallest number a dtype holds no direction.
    largest = slopes[1][slopes[1].isfinite()].abs().amax().item() if slopes[1].isfinite().any() else 0.0
    whole = largest > 64 * eps(dtype).smallest_normal * eps(dtype).eps
    precision = dtype if dtype != F64 else working_dtype(p)
    (assert_gradient_close if whole else assert_close_to_truth)(
        slopes[0], slopes[1], slopes[2], precision, "gradient"
    )


def held(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """The truth in float64, infinite where it is beyond the range of dtype."""
    rounded = truth.to(dtype).to(F64)
    return torch.where(rounded.isinf(), rounded, truth.to(F64))


def beside_one(x: Tensor) -> Tensor:
    return torch.cat([x.flatten().to(F64), torch.ones(1, dtype=F64)])


def ignored_voxels(p: MonaiProblem) -> Tensor:
    """Where the gradient is 0 here, and NaN in MONAI if the loss is infinite."""
    if p.levels is not None:
        return torch.zeros(sum(x.numel() for x in (p.logits, *p.levels)), dtype=torch.bool)
    if p.loss == "MaskedDiceLoss" and p.mask is not None:
        return (p.mask == 0).expand(p.logits.shape)
    index = p.options.get("ignore_index")
    if index is None:
        return torch.zeros(p.logits.shape, dtype=torch.bool)
    return (reference.ignore_mask(p.target, index) == 0).expand(p.logits.shape)


def sweep(problems: Iterable[MonaiProblem], backend: str) -> None:
    """``check`` of every problem; AssertionError with the seeds of those that fail."""
    failures, lucky, count = [], [], 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the volumes are small
    try:
        for p in problems:
            count += 1
            try:
                if check(p, backend):
                    lucky.append(p.seed)
            except Exception as error:
                failures.append(f"{p}\n    {type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(threads)
    assert not failures, f"{len(failures)} of {count} problems fail on {backend}:\n" + "\n".join(failures[:6])
    assert len(lucky) <= 1, f"MONAI's error is often smaller by luck than ours: seeds {lucky}"
