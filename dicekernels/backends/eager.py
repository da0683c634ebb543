"""The contract in PyTorch: any device, any dtype, chunk by chunk, differentiable to any order.

It serves double backward, targets that require gradients and devices without a kernel. The three
functions have the signatures of the ops; :func:`loss` composes them for autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import finish as formulas
from ..spec import (
    BAD,
    BINARY_TERMS,
    FN,
    FP,
    LS,
    NEG,
    POS,
    ROWS,
    TN,
    Activation,
    FinishSpec,
    G,
    I,
    LossSpec,
    N,
    Overlap,
    SumsSpec,
    VoxelTerm,
    Weights,
    chunk_count,
    chunk_voxels,
    row_index,
)

# Elements of (B, C, voxels) that are in flight at once.
PIECE_ELEMENTS = 1 << 22


class LabelRangeError(ValueError, RuntimeError):
    """A label map holds labels outside [0, C) that are not ``ignore_index``."""


class Piece:
    """A few chunks of every class in the accumulation dtype: z, g (B, C, v) and the weight m (B, 1, v).

    Logits, target and mask come with their space flattened, labels with a channel (:func:`_flat`).
    Where m is 0, z and g read 0, so nothing of an ignored voxel reaches a sum or a gradient.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        mask: Tensor | None,
        spec: SumsSpec,
        first: int,
        count: int,
    ):
        classes = logits.shape[1]
        window = slice(first, first + count)
        self.spec = spec
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        z = logits[:, :, window].to(self.dtype)
        m = torch.ones_like(z[:, :1]) if mask is None else mask[:, :, window].to(self.dtype)
        self.bad = torch.zeros((), dtype=torch.float64, device=z.device)
        if spec.dense:
            g = target[:, :, window].to(self.dtype)
        else:
            labels = target[:, :, window]
            ignored = ignored_labels(labels, spec.ignore_index)
            labels = labels.long()
            kept = (labels >= 0) & (labels < classes)
            self.bad = (~kept & ~ignored & (m != 0)).sum(dtype=torch.float64)
            kept = kept & ~ignored
            m = m * kept
            channels = torch.arange(classes, device=labels.device).view(1, -1, 1)
            g = (torch.where(kept, labels, -1) == channels).to(self.dtype)
        inside = m != 0
        self.m = m
        if mask is not None and mask.requires_grad:
            # The slope in a mask of 0 is that of the values under it; what is not finite stays out.
            self.z = torch.where(inside | z.isfinite(), z, 0.0)
            self.g = torch.where(inside | g.isfinite(), g, 0.0)
        else:
            self.z = torch.where(inside, z, 0.0)
            self.g = torch.where(inside, g, 0.0)

    def probabilities(self) -> Tensor:
        if self.spec.activation == Activation.SOFTMAX:
            return torch.softmax(self.z, 1)
        return torch.sigmoid(self.z) if self.spec.activation == Activation.SIGMOID else self.z

    def overlap_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """(tp, fp, fn) of every voxel, already weighted."""
        p, g, m = self.probabilities(), self.g, self.m
        if self.spec.product_mask:
            p, g, m = p * m, g * m, torch.ones_like(m)
        if self.spec.overlap == Overlap.PRODUCT:
            tp, fp, fn = p * g, p * (1 - g), (1 - p) * g
        elif self.spec.overlap == Overlap.SQUARED:
            tp, fp, fn = p * g, p * (p - g), g * (g - p)
        elif self.spec.overlap == Overlap.VOXEL_SQUARED:
            tp, fp, fn = p * p * g, p * p * (1 - g), (1 - p) ** 2 * g
        else:
            # In double: where p and g differ in sign the three cancel, and the rounding of float32 is left.
            p, g, m = p.double(), g.double(), m.double()
            tp = (p.abs() + g.abs() - (p - g).abs()) / 2
            fp, fn = p.abs() - tp, g.abs() - tp
        return m * tp, m * fp, m * fn

    def overlap_slope(self, p: Tensor, a: dict[int, Tensor]) -> Tensor:
        """d(a_I tp + a_FP fp + a_FN fn)/dp of every voxel, without the weight m."""
        g = self.g
        if self.spec.product_mask:
            p, g = p * self.m, g * self.m
        if self.spec.overlap == Overlap.PRODUCT:
            return (a[I] - a[FN]) * g + a[FP] * (1 - g)
        if self.spec.overlap == Overlap.SQUARED:
            return (a[I] - a[FN]) * g + a[FP] * (2 * p - g)
        if self.spec.overlap == Overlap.VOXEL_SQUARED:
            return 2 * (a[I] * p * g + a[FP] * p * (1 - g) - a[FN] * (1 - p) * g)
        share = (p.sign() - (p - g).sign()) / 2
        return (a[I] - a[FN] - a[FP]) * share + a[FP] * p.sign()

    def overlap_gradient(self, a: dict[int, Tensor]) -> Tensor:
        """Gradient of the overlap rows in z, without the weight m."""
        p = self.probabilities()
        slope = self.overlap_slope(p, a)
        if self.spec.activation == Activation.SOFTMAX:
            return p * (slope - (p * slope).sum(1, keepdim=True))
        return slope * p * torch.sigmoid(-self.z) if self.spec.activation == Activation.SIGMOID else slope

    def log_p(self) -> tuple[Tensor, Tensor]:
        """log p of the softmax from ``first_class`` on, and that of each voxel's label alone.

        The second is 0 in the other classes of a label map: what they add is 0 and not 0 * inf.
        """
        every = torch.log_softmax(self.z[:, self.spec.first_class :], 1)
        if self.spec.dense:
            return every, every
        return every, torch.where(self.g[:, self.spec.first_class :] != 0, every, 0.0)

    def voxel_terms(self) -> dict[int, Tensor]:
        """POS, NEG and LS of every voxel, already weighted."""
        z, g, m, spec = self.z, self.g, self.m, self.spec
        if spec.voxel_term not in BINARY_TERMS:
            every, own = self.log_p()
            loss = self._behind_first(softmax_term(spec, own)[0])
            terms = {POS: m * (g * loss)}
            if spec.rows & LS:
                terms[LS] = m * self._behind_first(softmax_term(spec, every)[0])
            return terms
        if spec.dense:
            positive, negative, _ = binary_term(spec, z, g, g, 1 - g)
            return {POS: m * g * positive, NEG: m * (1 - g) * negative}
        hit = g != 0
        loss = m * hard_term(spec, torch.where(hit, z, -z))[0]
        return {POS: torch.where(hit, loss, 0.0), NEG: torch.where(hit, 0.0, loss)}

    def voxel_gradient(self, a: dict[int, Tensor]) -> Tensor:
        """Gradient of the POS, NEG and LS rows in z, without the weight m."""
        z, g, spec = self.z, self.g, self.spec
        if spec.voxel_term not in BINARY_TERMS:
            every, own = self.log_p()
            pull = (a[POS] * g)[:, spec.first_class :] * softmax_term(spec, own)[1]
            if spec.rows & LS:
                pull = pull + a[LS][:, spec.first_class :] * softmax_term(spec, every)[1]
            p = torch.softmax(z[:, spec.first_class :], 1)
            return self._behind_first(pull - p * pull.sum(1, keepdim=True))
        if spec.dense:
            return binary_term(spec, z, g, a[POS] * g, a[NEG] * (1 - g))[2]
        hit = g != 0
        return torch.where(hit, a[POS], -a[NEG]) * hard_term(spec, torch.where(hit, z, -z))[1]

    def _behind_first(self, x: Tensor) -> Tensor:
        """Of the classes from ``first_class`` on, with zeros for those before."""
        return F.pad(x, (0, 0, self.spec.first_class, 0)) if self.spec.first_class else x


# Voxel terms are of two families, and a new one is a branch of one of them: loss and slope of every voxel and
# class, without weights.


def softmax_term(spec: SumsSpec, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of a voxel of this class, and its slope in log p."""
    gamma = spec.focal_gamma
    if spec.voxel_term == VoxelTerm.CE or gamma == 0:
        return -log_p, torch.full_like(log_p, -1.0)
    p = log_p.exp()
    certain = p >= 1  # there the slope of rest^gamma is infinite for gamma < 1
    rest = torch.where(certain, 1.0, 1 - p)
    power = rest**gamma
    loss = torch.where(certain, 0.0, power * -log_p)
    return loss, torch.where(certain, 0.0, power * (gamma * p * log_p / rest - 1))


def hard_term(spec: SumsSpec, s: Tensor) -> tuple[Tensor, Tensor]:
    """Of a target of 0 or 1, which turns the logit around: loss and slope in s = z (2g - 1).

    No infinity is taken from another one.
    """
    right, wrong, surprise = torch.sigmoid(s), torch.sigmoid(-s), -F.logsigmoid(s)
    if spec.voxel_term == VoxelTerm.BCE:
        return surprise, -wrong
    modulation = _modulation(spec, -s)
    return modulation * surprise, -modulation * (spec.focal_gamma * right * surprise + wrong)


def binary_term(spec: SumsSpec, z: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses that the target weighs by g and by 1 - g, and the slope in z of ``a`` first + ``b`` second."""
    if spec.voxel_term == VoxelTerm.BCE:
        return -F.logsigmoid(z), -F.logsigmoid(-z), b * torch.sigmoid(z) - a * torch.sigmoid(-z)
    sign = 2 * g - 1
    bce = z * (1 - g) - F.logsigmoid(z)
    slope = torch.sigmoid(z) - g - spec.focal_gamma * sign * torch.sigmoid(z * sign) * bce
    modulation = _modulation(spec, -z * sign)
    loss = modulation * bce
    return loss, loss, (a + b) * (slope * modulation)


def _modulation(spec: SumsSpec, s: Tensor) -> Tensor:
    """sigmoid(s)^gamma; 1 for gamma = 0, also of an infinite s."""
    gamma = spec.focal_gamma
    return torch.ones_like(s) if gamma == 0 else torch.exp(gamma * F.logsigmoid(s))


def _piece_rows(piece: Piece, chunk: int) -> Tensor:
    """(B, k, C, R) float64 sums of the k chunks in a piece."""
    rows, g, m = piece.spec.rows, piece.g, piece.m
    terms: dict[int, Tensor] = {}
    if rows & (I | FP | FN):
        terms[I], terms[FP], terms[FN] = piece.overlap_terms()
    if rows & G:
        terms[G] = m * g
    if rows & N:
        terms[N] = m.expand_as(g)
    if rows & TN:
        terms[TN] = m * (1 - piece.probabilities()) * (1 - g)
    if piece.spec.voxel_term != VoxelTerm.NONE:
        terms |= piece.voxel_terms()
    voxels = g.shape[2]
    chunks = max(1, -(-voxels // chunk))
    sums = []
    for bit in (1 << place for place in range(len(ROWS))):
        if rows & bit == BAD:
            edges = (0, chunks - 1, 0, g.shape[1] - 1, 0, g.shape[0] - 1)
            sums.append(F.pad(piece.bad.view(1, 1, 1), edges))
        elif rows & bit:
            values = terms.get(bit)
            values = torch.zeros_like(g) if values is None else values
            values = F.pad(values, (0, chunks * chunk - voxels))
            sums.append(values.unflatten(2, (chunks, chunk)).sum(3, dtype=torch.float64))
    return torch.stack(sums, -1).transpose(1, 2)


def _pieces(logits: Tensor, spec_chunk: int) -> list[tuple[int, int]]:
    """(first voxel, voxel count) of pieces that hold whole chunks."""
    samples, classes = logits.shape[:2]
    voxels = logits[0, 0].numel() if samples and classes else 0
    per_chunk = max(1, samples * classes * spec_chunk)
    step = spec_chunk * max(1, PIECE_ELEMENTS // per_chunk)
    return [(first, min(step, voxels - first)) for first in range(0, voxels, step)] or [(0, 0)]


def _flat(
    logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, C, V), (B, C or 1, V) and (B, 1, V): once for all pieces, a copy where strides ask for one."""
    labels = target if spec.dense else target.reshape(logits.shape[0], 1, *logits.shape[2:])
    return logits.flatten(2), labels.flatten(2), None if mask is None else mask.flatten(2)


def sums(logits: Tensor, target: Tensor, mask: Tensor | None, spec: SumsSpec) -> Tensor:
    """(B, K, C, R) float64: see dicekernels/ops.py."""
    samples, classes = logits.shape[:2]
    voxels = logits.shape[2:].numel()
    chunk = min(chunk_voxels(voxels), max(voxels, 1))
    if samples == 0 or voxels == 0:
        width = spec.rows.bit_count()
        return torch.zeros(
            samples, chunk_count(voxels), classes, width, dtype=torch.float64, device=logits.device
        )
    flat = _flat(logits, target, mask, spec)
    parts = []
    for first, count in _pieces(logits, chunk):
        parts.append(_piece_rows(Piece(*flat, spec, first, count), chunk))
    return torch.cat(parts, 1)


def loss(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    weights: Weights,
    spec: LossSpec,
    dtype: torch.dtype,
) -> Tensor:
    """The loss of a whole problem, differentiable in every tensor argument and to any order."""
    totals = sums(logits, target, mask, spec.sums).sum(1)
    return formulas.finish(totals, weights, spec.sums.rows, spec.finish, logits.numel() == 0, dtype)


def finish(
    slots: Tensor, weights: Weights, rows: int, spec: FinishSpec, empty: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(loss, coef): see dicekernels/ops.py."""
    arguments = (slots.sum(1), weights, rows, spec, empty)
    return formulas.finish(*arguments, dtype), formulas.coef(*arguments)


def ignored_labels(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Where a label map holds ``ignore_index``: float labels before their truncation, 0.7 is not 0."""
    if ignore_index is None:
        return torch.zeros_like(labels, dtype=torch.bool)
    # No integer dtype but int64 holds every index, no float dtype but float64.
    exact = labels.double() if labels.is_floating_point() else labels.long()
    return exact == ignore_index


def check_labels(slots: Tensor, target: Tensor, mask: Tensor | None, classes: int, spec: SumsSpec) -> None:
    """Raises LabelRangeError from the BAD row; only where reading it costs no synchronisation."""
    count = int(slots[..., row_index(spec.rows, BAD)].sum())
    if count == 0:
        return
    labels = target.flatten().long()
    wrong = ((labels < 0) | (labels >= classes)) & ~ignored_labels(target.flatten(), spec.ignore_index)
    if mask is not None:
        wrong &= mask.flatten() != 0
    at = int(wrong.nonzero()[0])
    voxels = max(1, labels.numel() // max(1, slots.shape[0]))
    value = target.flatten()[at].item()
    integral = float(value).is_integer()
    first = str(int(value)) if integral else str(value)
    remedy = (
        f"pass ignore_index={first} to leave these voxels out"
        if integral
        else "leave these voxels out by a mask"
    )
    raise LabelRangeError(
        f"target: {count} of {labels.numel()} voxels hold a label outside [0, {classes}), the first is "
        f"{first} (sample {at // voxels}, voxel {at % voxels}). Expected labels 0 to {classes - 1} "
        f"for logits with {classes} channels: remap the labels, give the network more channels, or "
        f"{remedy}"
    )


def sums_backward(
    grad_loss: Tensor | None,
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    coef: Tensor,
    spec: SumsSpec,
) -> Tensor:
    """Gradient of the logits, piece by piece, in closed form."""
    scaled = coef if grad_loss is None else coef * _per_class(grad_loss.to(coef), logits.shape[1])
    gradient = torch.empty_like(logits)
    voxels = logits.shape[2:].numel()
    if logits.numel() == 0:
        return gradient
    flat = _flat(logits, target, mask, spec)
    # Written piece by piece where the space of the gradient is one dimension of it.
    out = gradient.flatten(2)
    shared = out.data_ptr() == gradient.data_ptr()
    for first, count in _pieces(logits, min(chunk_voxels(voxels), voxels)):
        piece = Piece(*flat, spec, first, count)
        bits = (I, FP, FN, POS, NEG, LS, TN)
        zero = scaled.new_zeros(scaled.shape[:2])
        a = {bit: scaled[..., row_index(spec.rows, bit)] if spec.rows & bit else zero for bit in bits}
        a = {bit: value.unsqueeze(-1).to(piece.dtype) for bit, value in a.items()}
        a[FP] = a[FP] - a[TN]  # (1 - p)(1 - g) falls where p (1 - g) rises
        part = torch.zeros_like(piece.z)
        if spec.rows & (I | FP | FN):
            part = part + piece.overlap_gradient(a)
        if spec.voxel_term != VoxelTerm.NONE:
            part = part + piece.voxel_gradient(a)
        out[:, :, first : first + count] = part * piece.m
    return gradient if shared else gradient.copy_(out.view(gradient.shape))


def _per_class(grad_loss: Tensor, classes: int) -> Tensor:
    """() or (groups, outputs) to something that broadcasts with coef (B, C, R)."""
    if grad_loss.ndim == 0 or grad_loss.shape[1] == 1:
        return grad_loss.unsqueeze(-1) if grad_loss.ndim else grad_loss
    return F.pad(grad_loss, (classes - grad_loss.shape[1], 0)).unsqueeze(-1)
