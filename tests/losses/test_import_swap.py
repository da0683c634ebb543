"""A training script written for MONAI, run as text: as it is, and with the package of its import swapped.

The truth is the same script with a float64 network and MONAI; MONAI in float32 is the honest error.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch

from dicekernels.testing import assert_close_to_truth

pytest.importorskip("monai")

SCRIPT = """
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from monai.losses import {names}

dtype = torch.float32
torch.manual_seed(20)


class Net(nn.Module):
    # Logits at full and at half resolution.

    def __init__(self, classes):
        super().__init__()
        self.down = nn.Conv3d(1, 6, 3, stride=2, padding=1)
        self.deep = nn.Conv3d(6, 6, 3, padding=1)
        self.coarse = nn.Conv3d(6, classes, 1)
        self.skip = nn.Conv3d(1, 6, 3, padding=1)
        self.fine = nn.Conv3d(12, classes, 3, padding=1)

    def forward(self, x):
        low = F.silu(self.deep(F.silu(self.down(x))))
        up = F.interpolate(low, size=x.shape[2:], mode="nearest")
        return self.fine(torch.cat([F.silu(self.skip(x)), up], 1)), self.coarse(low)


def batches(count):
    # Two blobs in noise; class 2 lies inside class 1.
    grid = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 3, indexing="ij"))
    for _ in range(count):
        centres = 2.5 + 3 * torch.rand(2, 3, 1, 1, 1)
        distance = (grid - centres).norm(dim=1, keepdim=True)
        label = (distance < 3.5).long() + (distance < 2).long()
        yield (label + 0.5 * torch.randn(label.shape)).to(dtype), label


net = Net(classes={classes}).to(dtype)
loss_function = {loss}
optimizer = {optimizer}
data = list(batches(4))
valid = (torch.rand(2, 1, 8, 8, 8) > 0.2).to(dtype)

for step in range(20):
    image, label = data[step % len(data)]
    label = label.to({labels})
    logits, coarse = net(image)
    loss = loss_function({arguments})
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item())
"""

HOT = "to_onehot_y=True, softmax=True"
# Steps so small that no training multiplies the rounding of its first losses, MONAI's own included.
SGD = "torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)"
ADAM = "torch.optim.Adam(net.parameters(), lr=0.003)"
# Names that are imported, the loss, and what differs from the usual script.
LOSSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DiceLoss": ("DiceLoss", f"DiceLoss({HOT}, include_background=False)", {}),
    "GeneralizedDiceLoss": ("GeneralizedDiceLoss", f"GeneralizedDiceLoss({HOT})", {}),
    "TverskyLoss": ("TverskyLoss", f"TverskyLoss({HOT}, alpha=0.3, beta=0.7)", {}),
    "DiceCELoss": ("DiceCELoss", f"DiceCELoss({HOT}, weight=torch.tensor([0.5, 1.0, 2.0], dtype=dtype))", {}),
    "MaskedDiceLoss": ("MaskedDiceLoss", f"MaskedDiceLoss({HOT})", {"arguments": "logits, label, valid"}),
    "DiceFocalLoss": ("DiceFocalLoss", f"DiceFocalLoss({HOT}, lambda_focal=2.0)", {}),
    "GeneralizedDiceFocalLoss": ("GeneralizedDiceFocalLoss", f"GeneralizedDiceFocalLoss({HOT})", {}),
    "FocalLoss": ("FocalLoss", "FocalLoss(to_onehot_y=True, use_softmax=True, weight=[0.5, 1.0, 2.0])", {}),
    "GeneralizedWassersteinDiceLoss": (
        "GeneralizedWassersteinDiceLoss",
        "GeneralizedWassersteinDiceLoss(np.array([[0, 1, 1], [1, 0, 0.5], [1, 0.5, 0]], np.float32))",
        {},
    ),
    "MCCLoss": ("MCCLoss", f"MCCLoss({HOT})", {}),
    "DeepSupervisionLoss": (
        "DeepSupervisionLoss, DiceCELoss",
        f"DeepSupervisionLoss(DiceCELoss({HOT}), weights=[0.7, 0.3])",
        {"arguments": "[logits, coarse], label", "labels": ("torch.uint8",)},
    ),
    "MaskedLoss": (
        "DiceLoss, MaskedLoss",
        f"MaskedLoss(DiceLoss, {HOT}, batch=True)",
        {"arguments": "logits, label, valid"},
    ),
    "AsymmetricUnifiedFocalLoss": (
        "AsymmetricUnifiedFocalLoss",
        "AsymmetricUnifiedFocalLoss(gamma=0.4)",
        {
            "arguments": "logits.sigmoid(), (label > 0).to(label.dtype)",
            "classes": 1,
            "labels": ("torch.int64",),
        },
    ),
}
# MONAI cannot resize int64 for deep supervision, and negates uint8 targets in the unified focal loss.
CASES = [
    (name, kind) for name in LOSSES for kind in LOSSES[name][2].get("labels", ("torch.uint8", "torch.int64"))
]


def losses_of(script: str) -> torch.Tensor:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(script, {"__name__": "__main__"})
    return torch.tensor([float(line) for line in printed.getvalue().splitlines()], dtype=torch.float64)


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize(("name", "labels"), CASES)
def test_the_script_runs_unchanged(name: str, labels: str, optimizer: str) -> None:
    names, loss, other = LOSSES[name]
    values = {"classes": 3, "arguments": "logits, label", **other}
    script = SCRIPT.format(
        **values | {"names": names, "loss": loss, "labels": labels, "optimizer": optimizer}
    )
    swapped = script.replace(f"from monai.losses import {names}", f"from dicekernels import {names}")
    assert "monai" in script and "monai" not in swapped
    truth = losses_of(script.replace("dtype = torch.float32", "dtype = torch.float64"))
    honest, ours = losses_of(script), losses_of(swapped)
    assert len(truth) == 20
    assert truth[-4:].mean() < 0.97 * truth[:4].mean()  # it trains: an epoch has four steps
    assert_close_to_truth(ours, truth, honest, torch.float32, name)
