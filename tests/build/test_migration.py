"""docs/migrating-from-monai.md: before and after give the same, in the README too; its bundles load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dicekernels.testing import assert_close_to_truth, assert_gradient_close

monai_losses = pytest.importorskip("monai.losses")
bundle = pytest.importorskip("monai.bundle")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "migrating-from-monai.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE + (ROOT / "README.md").read_text(), re.DOTALL)
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
BEFORE = re.compile(r"# before: (from monai\.losses import (.*))\nfrom dicekernels import (.*)\n")


def run(block: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a block, whose random numbers are those of float32 in any dtype."""

    def randn(*size: int, requires_grad: bool = False) -> torch.Tensor:
        drawn: torch.Tensor = torch.empty(size, dtype=torch.float32).normal_()
        return drawn.to(dtype).requires_grad_(requires_grad)

    scope: dict[str, Any] = {}
    torch.manual_seed(2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        torch.set_default_dtype(dtype)  # of the other tensors that the block makes
        try:
            exec(block, scope)
        finally:
            torch.set_default_dtype(torch.float32)
    if scope["logits"].grad is None:
        scope["value"].backward()
    return scope["value"].detach(), scope["logits"].grad


SWAPS = [block for block in BLOCKS if BEFORE.search(block)]


@pytest.mark.parametrize("block", SWAPS, ids=[BEFORE.search(block)[3] for block in SWAPS])
def test_before_and_after_are_the_same(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = BEFORE.search(block)
    assert found and found[2] == found[3]
    before = BEFORE.sub(r"\1\n", block)
    assert "dicekernels" not in before
    value, gradient = run(block, torch.float32, monkeypatch)
    honest, honest_gradient = run(before, torch.float32, monkeypatch)
    truth, true_gradient = run(before, torch.float64, monkeypatch)
    assert_close_to_truth(value, truth.double(), honest, torch.float32, found[3])
    assert_gradient_close(gradient, true_gradient, honest_gradient, torch.float32, found[3])


def test_the_check_on_a_batch_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in BLOCKS if "gradient off by" in block)
    exec(block, {})
    apart = re.search(r"gradient off by (\S+)", capsys.readouterr().out)
    assert apart and float(apart[1]) < 16 * torch.finfo(torch.float32).eps


def test_every_loss_is_on_the_page() -> None:
    import dicekernels

    losses = {name for name in dicekernels.__all__ if name.endswith("Loss")}
    shown = {name.strip() for block in SWAPS for name in BEFORE.search(block)[3].split(",")}
    assert shown == losses


def test_every_segmentation_loss_that_stays_is_named() -> None:
    stays = re.findall(r"`(\w+Loss)`", PAGE[PAGE.index("## What stays") :].split("So do")[0])
    assert len(stays) == 8
    assert all(hasattr(monai_losses, name) for name in stays)


@pytest.mark.parametrize(("text", "name"), [*zip(YAML, ["DiceCELoss", "DiceFocalLoss"], strict=True)])
def test_bundles_build_our_losses(text: str, name: str) -> None:
    parser = bundle.ConfigParser(yaml.safe_load(text))
    loss = parser.get_parsed_content("loss")
    assert type(loss).__module__.startswith("dicekernels.") and type(loss).__name__ == name
    made = getattr(monai_losses, name)(to_onehot_y=True, softmax=True)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn((2, 3, 8, 8, 8), generator=generator)
    label = torch.randint(3, (2, 1, 8, 8, 8), generator=generator)
    truth = made(logits.double(), label).double()
    assert_close_to_truth(loss(logits, label), truth, made(logits, label), torch.float32, name)


def test_the_override_of_the_command_line() -> None:
    parser = bundle.ConfigParser({"loss": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True}})
    key, target = re.search(r"--(loss::_target_)\s+([\w.]+)", PAGE.replace("`. `", " ")).groups()
    parser[key] = target.rstrip(".")
    assert type(parser.get_parsed_content("loss")).__module__.startswith("dicekernels.")
