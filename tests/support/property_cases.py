"""What the property tests share: losses with options, random problems, how two runs are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from dicekernels import functional, reference
from dicekernels.backends.triton.support import interpreted
from dicekernels.testing import assert_close_to_truth, assert_gradient_close

F32, F64 = torch.float32, torch.float64
HOT = {"to_onehot_y": True, "softmax": True}
SIGMOIDS = {"to_onehot_y": True, "sigmoid": True}
# The same examples on every run; the fixture `backend` holds for all of them.
PROPERTY = settings(
    max_examples=8 if interpreted() else 50,  # a second each in Triton's interpreter
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass(frozen=True)
class Loss:
    """A function of ``dicekernels.functional`` with options, and its oracle."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, logits: Tensor, target: Tensor, **more: Any) -> Tensor:
        loss: Callable[..., Tensor] = getattr(functional, self.name)
        return loss(logits, target, **self.options | more)

    def oracle(self, logits: Tensor, target: Tensor, **more: Any) -> Tensor:
        loss: Callable[..., Tensor] = getattr(reference, self.name)
        return loss(logits, target, **self.options | more)

    @property
    def float32_value(self) -> bool:
        """Whether the loss is float32 for float64 logits, too, as MONAI's focal loss."""
        return self.name == "focal_loss"


# Softmax losses of label maps: one loss of every formula, with the options that change its shape.
SOFTMAX = [
    Loss("dice_loss", HOT),
    Loss("dice_loss", HOT | {"squared_pred": True, "batch": True}),
    Loss("dice_loss", HOT | {"jaccard": True}),
    Loss("dice_loss", HOT | {"log_loss": True}),
    Loss("generalized_dice_loss", HOT),
    Loss("generalized_dice_loss", HOT | {"w_type": "simple", "batch": True}),
    Loss("tversky_loss", HOT | {"alpha": 0.3, "beta": 0.7}),
    Loss("mcc_loss", HOT | {"smooth_nr": 0.5, "smooth_dr": 1.0}),
    Loss("dice_ce_loss", HOT | {"label_smoothing": 0.1, "lambda_dice": 0.4}),
    Loss("focal_loss", {"to_onehot_y": True, "use_softmax": True}),
    Loss("dice_focal_loss", HOT | {"use_softmax": True, "gamma": 1.5}),
    Loss("generalized_dice_focal_loss", HOT | {"use_softmax": True, "lambda_focal": 0.3}),
]
SIGMOID = [
    Loss("dice_loss", SIGMOIDS),
    Loss("generalized_dice_loss", SIGMOIDS | {"w_type": "uniform"}),
    Loss("tversky_loss", SIGMOIDS | {"batch": True}),
    Loss("focal_loss", {"to_onehot_y": True, "gamma": 1.0, "alpha": 0.3}),
    Loss("dice_focal_loss", SIGMOIDS | {"gamma": 0.5}),
]
LABEL_LOSSES = SOFTMAX + SIGMOID


@dataclass
class Labelled:
    """logits (B, C, *S) whose values float32 holds, labels (B, 1, *S)."""

    logits: Tensor
    labels: Tensor
    dtype: torch.dtype
    generator: torch.Generator

    @property
    def classes(self) -> int:
        return self.logits.shape[1]

    @property
    def voxels(self) -> int:
        return self.logits.shape[2:].numel()

    def flat(self) -> tuple[Tensor, Tensor]:
        return self.logits.flatten(2), self.labels.flatten(2)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def weights(self) -> Tensor:
        return self.uniform(self.classes) + 0.1


@st.composite
def problems(draw: st.DrawFn, classes: int | None = None) -> Labelled:
    """Random problems; every class has a voxel in each sample, so that no weight of GDL depends on luck."""
    samples = draw(st.integers(1, 3))
    channels = classes if classes is not None else draw(st.integers(2, 5))
    space = tuple(draw(st.lists(st.integers(2, 5), min_size=1, max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 4.0]))
    space = (*space[:-1], space[-1] + channels)
    logits = scale * torch.randn((samples, channels, *space), generator=generator)
    labels = torch.randint(0, channels, (samples, 1, *space), generator=generator)
    labels.flatten(2)[..., -channels:] = torch.arange(channels)
    dtype = draw(st.sampled_from([F32, F64]))
    return Labelled(logits, labels.to(torch.uint8), dtype, generator)


def value_and_gradient(
    loss: Callable[..., Tensor], logits: Tensor, target: Tensor, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    leaf = logits.to(dtype).requires_grad_()
    value = loss(leaf, target, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def assert_equal_losses(
    loss: Loss,
    dtype: torch.dtype,
    changed: tuple[Tensor, Tensor, dict[str, Any]],
    original: tuple[Tensor, Tensor, dict[str, Any]],
    back: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> None:
    """Ours of the changed problem in ``dtype`` is ours of the original one in float64.

    ``back`` turns the gradient of the original into that of the changed problem.
    """
    (z, y, more), (first_z, first_y, first_more) = changed, original
    truth, slope = value_and_gradient(loss, first_z, first_y, F64, first_more)
    ours, gradient = value_and_gradient(loss, z, y, dtype, more)
    honest, honest_gradient = value_and_gradient(loss.oracle, z, y, dtype, more)
    of_value = F32 if loss.float32_value else dtype
    assert_close_to_truth(ours, truth.double(), honest, of_value, f"{loss}")
    assert_gradient_close(gradient, back(slope), honest_gradient, dtype, f"{loss} gradient")
