"""docs/migrating-from-monai.md: its code runs, before and after give the same, its configurations load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dicekernels.testing import assert_close_to_truth

monai_losses = pytest.importorskip("monai.losses")
bundle = pytest.importorskip("monai.bundle")
yaml = pytest.importorskip("yaml")

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "migrating-from-monai.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
BEFORE = re.compile(r"# before: (from monai\.losses import (.*))\nfrom dicekernels import (.*)\n")


def names(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the page says its blocks have."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn((2, 3, 8, 8, 8), generator=generator).to(dtype)
    return {
        "torch": torch,
        "logits": logits.requires_grad_(),
        "coarse_logits": torch.randn((2, 3, 4, 4, 4), generator=generator).to(dtype),
        "label": torch.randint(0, 3, (2, 1, 8, 8, 8), generator=generator),
        "mask": (torch.rand((2, 1, 8, 8, 8), generator=generator) > 0.3).float(),
    }


def run(block: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    scope = names(dtype)
    torch.set_default_dtype(dtype)  # of the tensors that the block makes
    try:
        exec(block, scope)
    finally:
        torch.set_default_dtype(torch.float32)
    return scope["value"].detach()


def test_every_block_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    scope = names()
    for block in BLOCKS:
        exec(block, scope)
        if "value" in scope:
            scope.pop("value").sum().backward(retain_graph=True)
    printed = capsys.readouterr().out
    apart = re.search(r"gradient off by (\S+)", printed)
    assert apart and float(apart[1]) < 16 * torch.finfo(torch.float32).eps
    assert "backend:" in printed
    assert "HausdorffDTLoss: MONAI's HausdorffDTLoss has no counterpart here: keep it." in printed
    assert "['dice.class_weight', 'cross_entropy.weight', 'binary_cross_entropy.pos_weight']" in printed


SWAPS = [block for block in BLOCKS if BEFORE.search(block)]


@pytest.mark.parametrize("block", SWAPS, ids=[BEFORE.search(block)[3] for block in SWAPS])
def test_before_and_after_are_the_same(block: str) -> None:
    found = BEFORE.match(block)
    assert found and found[2] == found[3]
    before = BEFORE.sub(r"\1\n", block)
    assert "dicekernels" not in before
    honest, ours = run(before), run(block)
    assert_close_to_truth(ours, run(before, torch.float64).double(), honest, torch.float32, found[3])


def test_every_loss_is_on_the_page() -> None:
    import dicekernels

    losses = {name for name in dicekernels.__all__ if name.endswith("Loss")}
    shown = {name.strip() for block in SWAPS for name in BEFORE.match(block)[3].split(",")}
    assert shown == losses


def test_every_segmentation_loss_that_stays_is_named() -> None:
    stays = re.findall(r"`(\w+Loss)`", PAGE[PAGE.index("## What stays") :].split("So do")[0])
    assert len(stays) == 8
    assert all(hasattr(monai_losses, name) for name in stays)


@pytest.mark.parametrize(("text", "name"), zip(YAML, ["DiceCELoss", "DiceFocalLoss"], strict=True))
def test_bundles_build_our_losses(text: str, name: str) -> None:
    parser = bundle.ConfigParser(yaml.safe_load(text))
    loss = parser.get_parsed_content("loss")
    assert type(loss).__module__.startswith("dicekernels.") and type(loss).__name__ == name
    made = getattr(monai_losses, name)(to_onehot_y=True, softmax=True)
    data = names()
    truth = made(data["logits"].double(), data["label"]).detach().double()
    honest = made(data["logits"], data["label"])
    assert_close_to_truth(loss(data["logits"], data["label"]), truth, honest, torch.float32, name)


def test_the_override_of_the_command_line() -> None:
    parser = bundle.ConfigParser({"loss": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True}})
    key, target = re.search(r"--(loss::_target_)\s+([\w.]+)", PAGE.replace("`. `", " ")).groups()
    parser[key] = target.rstrip(".")
    assert type(parser.get_parsed_content("loss")).__module__.startswith("dicekernels.")
