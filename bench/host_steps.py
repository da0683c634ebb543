"""``python bench/host_steps.py FOLDER MODULE``: times MODULE's ``DiceCELoss`` for bench/host_cost.py.

MODULE is looked for in FOLDER first. The loss and the norm of its gradient come first; then a line of stdin,
"CONTENDER STEPS", is answered by the microseconds of a step. The file imports no other part of bench and of
dicekernels the package alone, so that it measures commits of every age alike.
"""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

# In the place of this file's folder.
sys.path[0] = sys.argv[1]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

_library = torch.library.Library("dicekernels_bench", "DEF")
for _schema, _body in (
    ("empty(Tensor logits, Tensor labels) -> Tensor", lambda logits, labels: logits.new_empty(())),
    ("empty_backward(Tensor grad, Tensor logits) -> Tensor", lambda grad, logits: torch.empty_like(logits)),
):
    _library.define(_schema)
    _library.impl(_schema.split("(")[0], _body, "CompositeExplicitAutograd")


class Empty(torch.autograd.Function):
    """An op that allocates the loss, and one that allocates the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        result: Tensor = torch.ops.dicekernels_bench.empty(logits, labels)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.dicekernels_bench.empty_backward(grad, *ctx.saved_tensors), None


def main() -> None:
    torch.set_num_threads(1)
    module = importlib.import_module(sys.argv[2])
    if sys.argv[2] == "dicekernels" and (
        not str(module.__file__).startswith(sys.argv[1]) or "cpu" not in module.available_backends()
    ):
        sys.exit(
            f"host_steps.py: expected dicekernels and its CPU library in {sys.argv[1]}: build or copy it"
        )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4, 8, 8, 8, generator=generator).requires_grad_()
    labels = torch.randint(4, (1, 1, 8, 8, 8), generator=generator).to(torch.uint8)
    losses = {"loss": module.DiceCELoss(to_onehot_y=True, softmax=True), "empty": Empty.apply}

    def step(loss: Any) -> tuple[Tensor, Tensor]:
        value = loss(logits, labels)
        return value, torch.autograd.grad(value, logits)[0]

    value, gradient = step(losses["loss"])
    print(value.item(), gradient.norm().item(), flush=True)
    for line in sys.stdin:
        name, count = line.split()
        loss, steps = losses[name], range(int(count))
        start = time.perf_counter()
        for _ in steps:
            step(loss)
        print((time.perf_counter() - start) / len(steps) * 1e6, flush=True)


if __name__ == "__main__":
    main()
