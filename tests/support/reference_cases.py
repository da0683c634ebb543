"""What the tests of the oracle share: the small problems worked by hand and the bound on their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dicekernels.testing import assert_close_to_truth

F64 = torch.float64


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def same(got: Tensor, expected: Any) -> None:
    """Equal to the number worked by hand, up to 8 eps of float64."""
    expected = torch.as_tensor(expected, dtype=F64)
    assert_close_to_truth(got, expected, expected, F64, "by hand")


def assert_derivatives(function: Callable[..., Any], inputs: list[Tensor]) -> None:
    """First and second, against differences; fast_mode projects the Jacobian on random vectors."""
    torch.manual_seed(2)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


# Two classes on four voxels.
P = tensor([[[0.75, 0.5, 0.25, 0.0], [0.25, 0.5, 0.75, 1.0]]])
HALVES = torch.tensor([[[0, 0, 1, 1]]])
# With P, class 0: I = 3/2, P = 3/2, G = 3; class 1: I = 1, P = 5/2, G = 1
UNEVEN = torch.tensor([[[0, 0, 0, 1]]])
ONE_HOT = tensor([[[1, 1, 1, 0], [0, 0, 0, 1]]])
PLAIN = {"to_onehot_y": True, "smooth_nr": 0.0, "smooth_dr": 0.0, "reduction": "none"}
# Its logarithms are logits; p_y of labels 0 0 0 1 is 3/4 1/2 1/4 1/2, of the other class
# 1/4 1/2 3/4 1/2. The product of p_y is 3/64 and of p_0 3/64, of p_1 3/64.
Q = tensor([[[0.75, 0.5, 0.25, 0.5], [0.25, 0.5, 0.75, 0.5]]])
