"""The code of the README runs as it stands, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_the_figures_are_those_of_the_committed_result():
    pytest.importorskip("tabulate")
    pytest.importorskip("monai")
    from bench import readme, schema

    block = readme.BLOCK.search(README.read_text())
    assert block["file"].startswith("bench/results/")
    expected = readme.section(schema.load(ROOT / block["file"]))
    assert expected in block[0]


def test_every_block_of_code_runs_and_trains(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names = {
        "logits": torch.randn(2, 4, 8, 8, 8, requires_grad=True),
        "label": torch.randint(4, (2, 1, 8, 8, 8), dtype=torch.uint8),
    }
    for block in blocks:
        exec(block, names)
    logits = names["logits"]
    dice_ce = torch.autograd.grad(names["loss"](logits, names["label"]), logits)[0]
    assert not torch.equal(logits.grad, dice_ce)  # that of the loss of one's own came on top
    assert "backend: cpu" in capsys.readouterr().out
