"""One module per backend: the same three ops (sums, finish, sums_backward) on each."""

from __future__ import annotations

import torch

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def refused(dtype: torch.dtype, classes: int, most: int) -> str:
    """ "" or the reason why kernels for up to ``most`` classes do not take logits of these."""
    if dtype not in KERNEL_DTYPES:
        return f"the logits are {dtype}, it takes float32, float16, bfloat16 and float64"
    return f"the logits have {classes} classes, it takes up to {most}" if classes > most else ""
