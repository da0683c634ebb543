"""Assertions that the tests, the benchmarks and users of the package share.

All three compare ``ours`` with a float64 ``truth``, and grant it what ``honest`` PyTorch needs: the
same problem, on the same inputs, computed by plain PyTorch in ``dtype``. For float16 and bfloat16
an honest result is the one computed in float32 from the half precision inputs and rounded to
``dtype``, as autocast does; a plain half precision sum overflows.

Notation: eps is ``torch.finfo(dtype).eps`` and err(x) = max |x - truth| over the elements.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error_bound(truth: Tensor, honest: Tensor, dtype: torch.dtype) -> float:
    """2 * err(honest) + 8 * eps(dtype) * max|truth|, the largest error that ours may have.

    Only elements where truth and honest are both finite count, so that an honest overflow does
    not excuse ours. 0 for tensors without such elements.
    """
    truth, honest = _double(truth), _double(honest)
    _same_shape(honest, truth, "honest")
    both = truth.isfinite() & honest.isfinite()
    scale = _largest(truth[truth.isfinite()])
    return 2 * _largest((honest - truth)[both]) + 8 * torch.finfo(dtype).eps * scale


def assert_close_to_truth(ours: Tensor, truth: Tensor, honest: Tensor, dtype: torch.dtype, name: str) -> None:
    """Every element of ours lies within ``error_bound`` of truth.

    NaN must stand exactly where truth has NaN, infinities where truth has them, with its sign.
    ``truth`` must be float64 (ValueError); shapes must agree exactly, without broadcasting.
    """
    if truth.dtype != torch.float64:
        raise ValueError(f"truth: got {truth.dtype}, expected torch.float64: compute it in double")
    ours, truth = _double(ours), _double(truth)
    _same_shape(ours, truth, f"{name} [{dtype}]")
    for kind, places in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (places(ours) != places(truth)).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise AssertionError(
                f"{name} [{dtype}]: {kind} misplaced in {len(wrong)} of {truth.numel()} elements, "
                f"first at {at}: ours {ours[at].item()!r}, truth {truth[at].item()!r}"
            )
    bound = error_bound(truth, honest, dtype)
    error = torch.where(truth.isfinite(), (ours - truth).abs(), 0)
    if error.numel() and error.max().item() > bound:
        at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name} [{dtype}]: max error {error.max().item():.6e} exceeds the bound {bound:.6e} "
            f"at {at}: ours {ours[at].item()!r}, truth {truth[at].item()!r}; "
            f"{int((error > bound).sum())} of {error.numel()} elements are out"
        )


def assert_gradient_close(ours: Tensor, truth: Tensor, honest: Tensor, dtype: torch.dtype, name: str) -> None:
    """``assert_close_to_truth``, and the whole vector in length and direction.

    With rel(x) = ||x - truth|| / ||truth|| (2-norm over all finite elements):
        rel(ours) <= r,  r = 16 * eps(dtype) + 2 * rel(honest)
        1 - cos(ours, truth) <= min(r**2, 1/2)
    The cosine says nothing new while r is small; it keeps a gradient from pointing away from the
    truth where honest PyTorch itself is far off (float16 underflow). Neither is asked of a truth
    that is zero everywhere.
    """
    assert_close_to_truth(ours, truth, honest, dtype, name)
    ours, truth, honest = _double(ours), _double(truth), _double(honest)
    finite = truth.isfinite()
    ours, truth = ours[finite], truth[finite]
    size = truth.norm().item()
    if size == 0:
        return
    both = honest[finite].isfinite()
    honest_error = (honest[finite] - truth)[both].norm().item() / size
    allowed = 16 * torch.finfo(dtype).eps + 2 * honest_error
    relative = (ours - truth).norm().item() / size
    if relative > allowed:
        raise AssertionError(
            f"{name} [{dtype}]: relative L2 error {relative:.6e} exceeds {allowed:.6e} "
            f"(honest PyTorch: {honest_error:.6e})"
        )
    if not ours.any():
        return  # no direction; the length above has its say
    # Half the squared distance of the unit vectors is 1 - cos without its cancellation.
    gap = 0.5 * (ours / max(ours.norm().item(), 1e-300) - truth / size).square().sum().item()
    if gap > min(allowed**2, 0.5):
        raise AssertionError(
            f"{name} [{dtype}]: direction off, 1 - cosine = {gap:.6e} exceeds {min(allowed**2, 0.5):.6e}"
        )


def _double(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _same_shape(got: Tensor, truth: Tensor, what: str) -> None:
    if got.shape != truth.shape:
        raise AssertionError(
            f"{what}: got shape {tuple(got.shape)}, expected the truth's {tuple(truth.shape)}"
        )
