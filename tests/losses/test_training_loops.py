"""Steps in Lightning's Trainer and MONAI's SupervisedTrainer: the losses of the same run with MONAI's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.losses
import pytest
import torch
from integration_cases import data
from monai.data import MetaTensor, list_data_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dicekernels
from dicekernels.testing import assert_close_to_truth

F32, F64 = torch.float32, torch.float64
STEPS = 6
HOT = {"to_onehot_y": True, "softmax": True}
LOSSES: dict[str, dict[str, Any]] = {
    "DiceCELoss": {**HOT, "include_background": False, "lambda_ce": 0.5},
    "DiceFocalLoss": {**HOT, "gamma": 1.5},
    "GeneralizedDiceLoss": HOT,
    "MCCLoss": HOT,
}
every_loss = pytest.mark.parametrize("name", LOSSES)


class Volumes(Dataset[dict[str, Tensor]]):
    """Four images whose intensities tell the class, with labels (1, *S), as tensors of this class."""

    def __init__(self, dtype: torch.dtype, kind: Callable[[Tensor], Tensor] = torch.as_tensor) -> None:
        self.items = []
        for seed in range(4):
            noise, labels, _ = data("DiceLoss", F64, (8, 8, 8), seed)
            image = (0.3 * noise[0, :1] + labels[0]).to(dtype)
            self.items.append({"image": kind(image), "label": kind(labels[0])})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 3, 1))
    return layers.to(dtype)


def loader(dtype: torch.dtype) -> DataLoader[Any]:
    return DataLoader(Volumes(dtype), batch_size=2, shuffle=False)


def loader_of_meta_tensors(dtype: torch.dtype) -> DataLoader[Any]:
    return DataLoader(Volumes(dtype, MetaTensor), batch_size=2, shuffle=False, collate_fn=list_data_collate)


def lightning_losses(loss: nn.Module, dtype: torch.dtype, folder: Path, **options: Any) -> Tensor:
    lightning = pytest.importorskip("lightning.pytorch")

    class Segmentation(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.loss, self.losses = network(dtype), loss, []

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            value = self.loss(self.network(batch["image"]), batch["label"])
            self.losses.append(value.item())
            return value

        def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
            self.log("validation", self.loss(self.network(batch["image"]), batch["label"]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.network.parameters(), lr=0.5)

    module = Segmentation()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, loader(dtype), loader(dtype))
    assert trainer.callback_metrics["validation"] < module.losses[0]
    return torch.tensor(module.losses, dtype=F64)


def monai_losses(loss: nn.Module, dtype: torch.dtype) -> Tensor:
    engines = pytest.importorskip("monai.engines")
    pytest.importorskip("ignite")
    from ignite.engine import Events

    model = network(dtype)
    trainer = engines.SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=STEPS // 2,
        train_data_loader=loader_of_meta_tensors(dtype),
        network=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        loss_function=loss,
    )
    losses: list[float] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep() -> None:
        losses.append(float(trainer.state.output[0]["loss"]))  # one output for each sample

    trainer.run()
    return torch.tensor(losses, dtype=F64)


def assert_follows(run: Callable[[nn.Module, torch.dtype], Tensor], name: str) -> None:
    """The run's losses with our module stay within the bound of MONAI's, and fall."""
    theirs, ours_module = (getattr(lib, name)(**LOSSES[name]) for lib in (monai.losses, dicekernels))
    truth, honest = run(copy.deepcopy(theirs), F64), run(theirs, F32)
    ours = run(ours_module, F32)
    assert len(ours) == STEPS
    assert truth[-1] < truth[0]
    assert_close_to_truth(ours, truth, honest, F32, name)


@every_loss
def test_lightning(name: str, tmp_path: Path) -> None:
    assert_follows(lambda loss, dtype: lightning_losses(loss, dtype, tmp_path), name)


@every_loss
def test_monais_supervised_trainer(name: str) -> None:
    assert_follows(monai_losses, name)


def test_lightning_in_mixed_precision_accumulating_two_batches(tmp_path: Path) -> None:
    """bfloat16 logits: ours sums them in float32, so the first loss is that of a float64 loss of them."""
    loss = dicekernels.DiceCELoss(**HOT)
    losses = lightning_losses(
        loss, F32, tmp_path, precision="bf16-mixed", accumulate_grad_batches=2, max_epochs=STEPS
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(F32)(next(iter(loader(F32)))["image"])
    labels = next(iter(loader(F32)))["label"]
    theirs = monai.losses.DiceCELoss(**HOT)
    truth, honest = theirs(logits.double(), labels), theirs(logits.float(), labels)
    assert_close_to_truth(losses[0], truth, honest, F32, "bf16-mixed")
    assert losses[-1] < losses[0]
