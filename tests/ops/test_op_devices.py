"""The compiled ops refuse tensors of other devices, by name.

The dispatcher goes by all tensors of a call together, so that the function of one device may get tensors of
another. Here it is called as if it had been chosen; "meta" stands for any device whose memory it cannot read.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import emulated
import pytest
import torch
from processes import captured
from torch import Tensor

from dicekernels.backends import native
from dicekernels.spec import BAD, OVERLAP_ROWS, Activation, FinishSpec, Formula, G, N, SumsSpec

SPEC = SumsSpec(False, Activation.SOFTMAX, rows=OVERLAP_ROWS | G | N | BAD)
FINISH = FinishSpec(Formula.RATIO)
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
REASONS = {
    "dicekernels": lambda: native.load_error("cpu") or "",
    "dicekernels_emulated": emulated.unavailable,
}


@pytest.fixture(params=REASONS)
def ops(request: pytest.FixtureRequest) -> Any:
    if reason := REASONS[request.param]():
        pytest.skip(reason)
    return getattr(torch.ops, request.param)


def call(op: Any, tensors: dict[str, Tensor | None], *numbers: Any) -> Any:
    return op.default.redispatch(CPU, *tensors.values(), *numbers)


def passes() -> dict[str, Tensor | None]:
    return {
        "logits": torch.randn(2, 3, 10),
        "target": torch.randint(3, (2, 1, 10)),
        "mask": torch.rand(2, 1, 10),
    }


def backward() -> dict[str, Tensor | None]:
    coef = torch.rand(2, 3, SPEC.rows.bit_count(), dtype=torch.float64)
    return {"grad_loss": torch.ones(()), **passes(), "coef": coef}


def sums() -> dict[str, Tensor | None]:
    weights = {"class_weight": torch.ones(3), "pos_weight": torch.ones(3), "neg_weight": torch.ones(3)}
    lambdas = {"region_lambda": torch.ones(()), "voxel_lambda": torch.ones(())}
    slots = torch.rand(2, 1, 3, SPEC.rows.bit_count(), dtype=torch.float64)
    return {"sums": slots, **weights, **lambdas}


CALLS = {
    "sums": (passes, SPEC.args()),
    "sums_backward": (backward, SPEC.args()),
    "finish": (sums, (SPEC.rows, *FINISH.args(False), torch.float32)),
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in CALLS for name in CALLS[op][0]()])
def test_a_tensor_of_another_device_is_refused_by_name(ops, op, name):
    make, numbers = CALLS[op]
    call(getattr(ops, op), make(), *numbers)
    tensors = make()
    tensors[name] = tensors[name].to("meta")
    refused = f"{name}: got a tensor on meta, expected one on cpu .* move it with {name}.to\\('cpu'\\)"
    with pytest.raises(RuntimeError, match=refused):
        call(getattr(ops, op), tensors, *numbers)


@pytest.mark.skipif(not native.library_path("cuda").is_file(), reason="the CUDA library was not built")
@pytest.mark.parametrize("op", CALLS)
def test_the_cuda_library_refuses_tensors_of_the_cpu(op):
    """One tensor of a GPU brings those of the CPU here. No GPU is asked: the refusal comes first.

    In a process of its own, where the library may be loaded beside a torch without CUDA.
    """
    code = f"""if True:
        import torch, test_op_devices
        if test_op_devices.native.load_error("cuda"):
            torch.ops.load_library({str(native.library_path("cuda"))!r})
        make, numbers = test_op_devices.CALLS[{op!r}]
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        getattr(torch.ops.dicekernels, {op!r}).default.redispatch(key, *make().values(), *numbers)
    """
    done = captured([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert re.search("(logits|sums): got a tensor on cpu, expected one on cuda", done.stderr), done.stderr
