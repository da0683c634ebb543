"""The contenders: ours, and what others offer for the same job, built as their users would.

Every loss here is the softmax form over integer labels with all defaults of MONAI 1.6.1, so that
one constructor call serves ours and MONAI's. Half precision logits go to the peers as float32,
as autocast would do; ours takes them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dicekernels
from bench.cases import Case
from dicekernels import reference, testing

try:
    import monai.losses
except ImportError:  # a GPU node without it: its rows then say so
    monai = None

Loss = Callable[[Tensor, Tensor], Tensor]

CLASSES = {
    "dice": "DiceLoss",
    "dice_ce": "DiceCELoss",
    "gdl": "GeneralizedDiceLoss",
    "tversky": "TverskyLoss",
    "dice_focal": "DiceFocalLoss",
    "gdl_focal": "GeneralizedDiceFocalLoss",
}
OPTIONS = {"to_onehot_y": True, "softmax": True}
TRUTHS: dict[str, Callable[..., Tensor]] = {
    "dice": reference.dice_loss,
    "dice_ce": reference.dice_ce_loss,
    "gdl": reference.generalized_dice_loss,
    "tversky": reference.tversky_loss,
    "dice_focal": reference.dice_focal_loss,
    "gdl_focal": reference.generalized_dice_focal_loss,
}
# MONAI's smooth_nr and smooth_dr.
SMOOTH = 1e-5


@dataclass(frozen=True)
class Contender:
    """role: "ours", "eager" (a library as it is) or "compiled" (anything under torch.compile).

    backend: of ours, if it is forced.
    """

    name: str
    role: str
    loss: Loss
    backend: str | None = None


@dataclass(frozen=True)
class Check:
    """Value and gradient of a contender against the float64 truth.

    reason: empty when passed. value_error: |loss - truth|. gradient_error: relative L2 error.
    """

    passed: bool
    reason: str
    value_error: float | None
    gradient_error: float | None


def contenders(
    case: Case, backends: Sequence[str], compiled: bool, with_monai: bool = True
) -> list[Contender]:
    """All that run on the case, ours first. ``backends`` empty: ours by its own choice."""
    found = [Contender(f"dicekernels ({name})", "ours", ours(case, name), name) for name in backends]
    found = found or [Contender("dicekernels", "ours", ours(case))]
    if with_monai:
        found.append(Contender("MONAI", "eager", monai_loss(case)))
    if compiled:
        found += [
            Contender("MONAI, compiled", "compiled", torch.compile(monai_loss(case))),
            Contender("closed form, autograd", "compiled", closed_form_autograd(case)),
            Contender("closed form, one-hot", "compiled", closed_form(case, one_hot_pair(case))),
            Contender("closed form, unrolled", "compiled", closed_form(case, unrolled_pair(case))),
        ]
    return found


def ours(case: Case, backend: str | None = None) -> Loss:
    loss: Loss = getattr(dicekernels, CLASSES[case.loss])(**OPTIONS)
    if backend is None:
        return loss

    def forced(logits: Tensor, labels: Tensor) -> Tensor:
        with dicekernels.use_backend(backend):
            return loss(logits, labels)

    return forced


def monai_loss(case: Case) -> Loss:
    if monai is None:

        def absent(logits: Tensor, labels: Tensor) -> Tensor:
            raise ModuleNotFoundError("monai is not installed; put its wheel into .whl/ (bench/gpu.sh)")

        return absent
    loss: Loss = getattr(monai.losses, CLASSES[case.loss])(**OPTIONS)
    return (lambda logits, labels: loss(logits.float(), labels)) if _half(case) else loss


class Checker:
    """Holds the truth of one case: textbook PyTorch in float64, and MONAI eager as the honest peer.

    Where there is no MONAI, textbook PyTorch in float32 is. Bounds are those of ``dicekernels.testing``.
    """

    def __init__(self, case: Case, logits: Tensor, labels: Tensor) -> None:
        self.case, self.logits, self.labels = case, logits, labels
        truth = TRUTHS[case.loss]
        wide = logits.detach().double().requires_grad_()
        self.truth = value_and_gradient(lambda z, y: truth(z, y, **OPTIONS), wide, labels)
        plain = lambda z, y: truth(z.float(), y, **OPTIONS)  # noqa: E731
        self.honest = value_and_gradient(plain if monai is None else monai_loss(case), logits, labels)

    def check(self, loss: Loss) -> Check:
        value, gradient = value_and_gradient(loss, self.logits, self.labels)
        dtype = self.logits.dtype
        reason = ""
        try:
            testing.assert_close_to_truth(value, self.truth[0], self.honest[0], self.honest[0].dtype, "loss")
            testing.assert_gradient_close(gradient, self.truth[1], self.honest[1], dtype, "gradient")
        except AssertionError as error:
            reason = str(error)
        value_error = (value.double() - self.truth[0]).abs().item()
        difference = torch.linalg.vector_norm(gradient.double() - self.truth[1])
        gradient_error = (difference / torch.linalg.vector_norm(self.truth[1])).item()
        return Check(not reason, reason, value_error, gradient_error)


def value_and_gradient(loss: Loss, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


# The best that a user can write in PyTorch for torch.compile. The maths is that of the fused
# kernels: sums I = sum p g, P = sum p, G = sum g per (sample, class), a formula over them, and
# dloss/dlogit_c = p_c (q_c - sum_k p_k q_k) [+ CE's (p_c - g_c) / voxels], q_c = a_I g_c + a_P.
# The focal loss of MONAI's defaults is that of sigmoids with gamma = 2, whatever p is: s = logit where
# g = 1, -logit elsewhere, loss (1 - sigmoid(s))^2 softplus(-s), mean over voxels and classes.


def formula(case: Case, I: Tensor, P: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(overlap loss, dloss/dI, dloss/dP) of ``(B, C)`` sums."""
    if case.loss in ("gdl", "gdl_focal"):
        w = 1 / (G * G)
        absent = torch.isinf(w)
        w = torch.where(absent, 0, w)
        w = torch.where(absent, w.amax(1, keepdim=True), w)
        over = 2 * (w * I).sum(1, keepdim=True) + SMOOTH
        under = (w * (P + G)).sum(1, keepdim=True) + SMOOTH
        count = len(I)
        d_I, d_P = -2 * w / under / count, w * over / under**2 / count
    elif case.loss == "tversky":
        over, under, count = I + SMOOTH, (P + G) / 2 + SMOOTH, I.numel()
        d_I, d_P = -1 / under / count, over / (2 * under**2) / count
    else:
        over, under, count = 2 * I + SMOOTH, P + G + SMOOTH, I.numel()
        d_I, d_P = -2 / under / count, over / under**2 / count
    return (1 - over / under).mean(), d_I, d_P


def closed_form_autograd(case: Case) -> Loss:
    """The textbook form without materialised one-hot: the compiler derives the backward pass."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        hot = _one_hot(logits, labels)
        log_p = torch.log_softmax(logits.float() if _half(case) else logits, 1)
        p = log_p.exp()
        space = tuple(range(2, logits.ndim))
        I, P = torch.where(hot, p, 0).sum(space), p.sum(space)
        value, _, _ = formula(case, I, P, hot.sum(space).to(p.dtype))
        if case.loss == "dice_ce":
            value = value - torch.where(hot, log_p, 0).sum() / labels.numel()
        if _with_focal(case):
            value = value + focal(logits.float() if _half(case) else logits, hot)[0].mean()
        return value

    compiled: Loss = torch.compile(loss, dynamic=False)
    return compiled


Pair = tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]


def closed_form(case: Case, pair: Pair) -> Loss:
    """An autograd.Function of two compiled functions: nothing derived, nothing large saved."""
    forward_pass = torch.compile(pair[0], dynamic=False)
    backward_pass = torch.compile(pair[1], dynamic=False)

    class ClosedForm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
            value, *rest = forward_pass(logits, labels)
            ctx.save_for_backward(logits, labels, *rest)
            return value

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return backward_pass(grad, *ctx.saved_tensors), None

    apply: Loss = ClosedForm.apply
    return apply


def one_hot_pair(case: Case) -> Pair:
    """Whole-tensor operations; the log-sum-exp of each voxel is saved for backward."""
    with_ce, with_focal = case.loss == "dice_ce", _with_focal(case)

    def forward_pass(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        z = logits.float() if _half(case) else logits
        hot = _one_hot(z, labels)
        space = tuple(range(2, z.ndim))
        lse = torch.logsumexp(z, 1, keepdim=True)
        log_p = z - lse
        p = log_p.exp()
        I, P = torch.where(hot, p, 0).sum(space), p.sum(space)
        value, d_I, d_P = formula(case, I, P, hot.sum(space).to(p.dtype))
        if with_ce:
            value = value - torch.where(hot, log_p, 0).sum() / labels.numel()
        if with_focal:
            value = value + focal(z, hot)[0].mean()
        return value, lse, d_I, d_P

    def backward_pass(
        grad: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, d_I: Tensor, d_P: Tensor
    ) -> Tensor:
        z = logits.float() if _half(case) else logits
        hot = _one_hot(z, labels)
        per_voxel = (..., *[None] * (z.ndim - 2))
        p = (z - lse).exp()
        q = torch.where(hot, d_I[per_voxel], 0) + d_P[per_voxel]
        d_logits = p * (q - (p * q).sum(1, keepdim=True))
        if with_ce:
            d_logits = d_logits + (p - hot.to(p.dtype)) / labels.numel()
        if with_focal:
            d_logits = d_logits + focal(z, hot)[1] / z.numel()
        return (grad * d_logits).to(logits.dtype)

    return forward_pass, backward_pass


def unrolled_pair(case: Case) -> Pair:
    """One expression per class, so that the compiler sees voxel loops only and fuses all into one.

    Nothing but ``(B, C)`` coefficients is saved. The code, and the time to compile it, grow with
    the number of classes.
    """
    with_ce, with_focal = case.loss == "dice_ce", _with_focal(case)

    def classes(logits: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """e_c = exp(z_c - max), 1 / sum e, log-sum-exp, labels; all ``(B, V)``."""
        z = (logits.float() if _half(case) else logits).flatten(2).unbind(1)
        largest = z[0]
        for z_c in z[1:]:
            largest = torch.maximum(largest, z_c)
        e = [(z_c - largest).exp() for z_c in z]
        total = e[0]
        for e_c in e[1:]:
            total = total + e_c
        return e, 1 / total, total.log() + largest, labels.flatten(1).int()

    def forward_pass(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        e, scale, lse, y = classes(logits, labels)
        z = (logits.float() if _half(case) else logits).flatten(2).unbind(1)
        p = [e_c * scale for e_c in e]
        I = torch.stack([torch.where(y == c, p_c, 0).sum(1) for c, p_c in enumerate(p)], 1)
        P = torch.stack([p_c.sum(1) for p_c in p], 1)
        G = torch.stack([(y == c).sum(1) for c in range(len(p))], 1).to(P.dtype)
        value, d_I, d_P = formula(case, I, P, G)
        if with_ce:
            surprise = lse
            for c, z_c in enumerate(z):
                surprise = torch.where(y == c, lse - z_c, surprise)
            value = value + surprise.sum() / labels.numel()
        if with_focal:
            terms = [focal(z_c, y == c)[0].sum() for c, z_c in enumerate(z)]
            value = value + torch.stack(terms).sum() / logits.numel()
        return value, d_I, d_P

    def backward_pass(grad: Tensor, logits: Tensor, labels: Tensor, d_I: Tensor, d_P: Tensor) -> Tensor:
        e, scale, _, y = classes(logits, labels)
        p = [e_c * scale for e_c in e]
        q = [torch.where(y == c, d_I[:, c, None], 0) + d_P[:, c, None] for c in range(len(p))]
        mean = p[0] * q[0]
        for p_c, q_c in zip(p[1:], q[1:], strict=True):
            mean = mean + p_c * q_c
        z = (logits.float() if _half(case) else logits).flatten(2).unbind(1)
        d_classes = []
        for c, (p_c, q_c) in enumerate(zip(p, q, strict=True)):
            d_c = p_c * (q_c - mean)
            if with_ce:
                d_c = d_c + (p_c - torch.where(y == c, 1.0, 0.0)) / labels.numel()
            if with_focal:
                d_c = d_c + focal(z[c], y == c)[1] / logits.numel()
            d_classes.append((grad * d_c).to(logits.dtype))
        if case.layout == "channels_last":
            batch, channels, *space = logits.shape
            return torch.stack(d_classes, 2).view(batch, *space, channels).movedim(-1, 1)
        return torch.stack(d_classes, 1).view(logits.shape)

    return forward_pass, backward_pass


def focal(z: Tensor, hot: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoid focal loss of every element, and its derivative in the logit."""
    s = torch.where(hot, z, -z)
    wrong, surprise = torch.sigmoid(-s), -torch.nn.functional.logsigmoid(s)
    slope = wrong * wrong * (2 * (1 - wrong) * surprise + wrong)
    return wrong * wrong * surprise, torch.where(hot, -slope, slope)


def _with_focal(case: Case) -> bool:
    return case.loss in ("dice_focal", "gdl_focal")


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    index = torch.arange(logits.shape[1], device=labels.device, dtype=labels.dtype)
    return labels == index.view(1, -1, *[1] * (logits.ndim - 2))


def _half(case: Case) -> bool:
    return case.dtype in ("float16", "bfloat16")
