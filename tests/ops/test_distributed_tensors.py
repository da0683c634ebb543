"""Tensors of torch.distributed are refused by name, with the remedy, in a process group of one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from processes import captured

CODE = """
import sys
import torch
import torch.distributed

before = "torch.distributed.tensor" in sys.modules
import dicekernels

assert ("torch.distributed.tensor" in sys.modules) == before, "imported for a check"
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
z, y, m = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 1, 5, 6)), torch.rand(2, 1, 5, 6)
parts = [distribute_tensor(x, mesh, [Shard(0)]) for x in (z, y, m)]
weight = distribute_tensor(torch.ones(4), mesh, [Replicate()])
kind = getattr(dicekernels, sys.argv[2])
loss, weighted = kind(to_onehot_y=True), kind(to_onehot_y=True, weight=torch.ones(4))
for module in weighted.modules():  # as distribute_module does
    for key in ("weight", "class_weight"):
        if module._buffers.get(key) is not None:
            module._buffers[key] = weight
for call in (
    lambda: loss(*parts[:2], mask=parts[2]),
    lambda: loss(z, parts[1]),
    lambda: loss(z, y, mask=parts[2]),
    lambda: kind(to_onehot_y=True, weight=weight),
    lambda: weighted(z, y),
):
    try:
        call()
    except TypeError as error:
        print(error)
for plain in ([x.to_local() for x in parts], [x.full_tensor() for x in parts]):
    assert torch.equal(loss(*plain[:2], mask=plain[2]), loss(z, y, mask=m)), "the remedy gives another number"
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("name", ["DiceLoss", "DiceCELoss", "DiceFocalLoss", "FocalLoss"])
def test_distributed_tensors_are_refused_by_name(name: str, tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    run = captured([sys.executable, "-c", CODE, str(tmp_path / "store"), name], timeout=300)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["logits", "target", "mask", "weight", "weight"]
    for line in lines:
        assert "got a DTensor placed (" in line and "expected a torch.Tensor" in line
        assert ".to_local() where it is replicated or each rank has samples of its own" in line
        assert ".full_tensor() where its classes or its space are split" in line
