"""Networks and loops of users who need only parts of the package.

`python networks.py PROCESSES FILE` runs all of them on several processes and saves the results.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.batches import Batches
from lit_threeseven.functional import mean_squared_error

Loss = Callable[[LitThreeSeven, Tensor, Tensor, float], Tensor]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def squared(probability: Tensor, y: Tensor, divisor: float) -> Tensor:
    return ((probability - y) ** 2).sum() / divisor


class OwnForward(LitThreeSeven):
    """Overrides `forward` only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(2 * x.flatten(1) @ self.W - self.b)


class OwnOptimizer(LitThreeSeven):
    """Overrides `configure_optimizers` only."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class OwnStep(LitThreeSeven):
    """Overrides `training_step` only, with a loss that is a mean over what it gets."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.binary_cross_entropy(self(x), y)


class OwnTerm(LitThreeSeven):
    """Adds a term to the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.1 * self.W.square().sum()


class OwnLayer(LitThreeSeven):
    """Adds a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(784, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x.flatten(1) @ self.W + self.b + self.out(torch.tanh(self.hidden(x.flatten(1)))))


class FrozenBias(LitThreeSeven):
    """Doesn't train `b`."""

    def __init__(self) -> None:
        super().__init__()
        self.b.requires_grad_(False)


# Each network with its loss, written independently.
NETWORKS: dict[type[LitThreeSeven], Loss] = {
    LitThreeSeven: lambda m, x, y, n: squared(torch.sigmoid(x @ m.W + m.b), y, n),
    OwnForward: lambda m, x, y, n: squared(torch.sigmoid(2 * x @ m.W - m.b), y, n),
    OwnOptimizer: lambda m, x, y, n: squared(torch.sigmoid(x @ m.W + m.b), y, n),
    OwnStep: lambda m, x, y, n: nn.functional.binary_cross_entropy(torch.sigmoid(x @ m.W + m.b), y),
    OwnTerm: lambda m, x, y, n: squared(torch.sigmoid(x @ m.W + m.b), y, n) + 0.1 * (m.W * m.W).sum(),
    OwnLayer: lambda m, x, y, n: squared(torch.sigmoid(x @ m.W + m.b + m.out(m.hidden(x).tanh())), y, n),
    FrozenBias: lambda m, x, y, n: squared(torch.sigmoid(x @ m.W + m.b), y, n),
}
BATCH_SIZES = (None, 4001)  # three processes can't share 4001 rows evenly


def trained(network: type[LitThreeSeven], batch_size: int | None, devices: int = 1) -> dict[str, Tensor]:
    """The weights after two epochs of a plain Trainer."""
    torch.manual_seed(0)
    model = network()
    strategy = "ddp" if devices > 1 else "auto"
    trainer = L.Trainer(devices=devices, strategy=strategy, max_epochs=2, log_every_n_steps=1, **QUIET)
    trainer.fit(model, ThreeSevenDataModule(batch_size=batch_size))
    return model.state_dict()


def by_hand(network: type[LitThreeSeven], batch_size: int | None, processes: int = 1) -> dict[str, Tensor]:
    """The same weights from a plain loop: each step's loss is the mean of the losses of all processes' shares."""
    torch.manual_seed(0)
    model, loss_of = network(), NETWORKS[network]
    data = ThreeSevenDataModule(batch_size=batch_size)
    data.setup("fit")
    worlds = [Batches(data.train, batch_size, shuffle=True, share=(rank, processes)) for rank in range(processes)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0) if network is not OwnOptimizer else torch.optim.Adam(trained, lr=0.01)
    for _ in range(2):
        for batches in zip(*worlds, strict=True):
            rows = sum(len(batch.y) for batch in batches)
            losses = [loss_of(model, batch.x, batch.y, rows / processes) for batch in batches]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
    return model.state_dict()


class Stranger(L.LightningModule):
    """Someone's network that knows nothing of this package; keeps the losses and counts the rows that it saw."""

    def __init__(self, *layers: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.network, self.lr = nn.Sequential(*layers), lr
        self.losses: list[float] = []
        self.seen: list[float] = []
        self.rows = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(torch.sigmoid(self.network(x)), y)
        self.losses.append(loss.item())
        self.seen.append(x.sum().item())
        self.rows += len(y)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class ToImages(nn.Module):
    """Rows of pixels as images."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 1, 28, 28)


def linear() -> Stranger:
    torch.manual_seed(0)
    return Stranger(nn.Linear(784, 1))


def cnn() -> Stranger:
    torch.manual_seed(0)
    return Stranger(ToImages(), nn.Conv2d(1, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))


def fit(model: L.LightningModule, data: Any, devices: int = 1, **options: Any) -> L.Trainer:
    """A plain Trainer's fit."""
    strategy = "ddp" if devices > 1 else "auto"
    trainer = L.Trainer(devices=devices, strategy=strategy, **{"max_epochs": 2} | QUIET | options)
    trainer.fit(model, data)
    return trainer


def tensor_loader(batch_size: int = 500) -> DataLoader:
    """A plain DataLoader of the first 3,000 training images."""
    data = ThreeSevenDataModule()
    data.setup("fit")
    images, y = data.train[:3000]
    return DataLoader(TensorDataset(images / 255, y), batch_size=batch_size)


def fabric_loop(devices: int = 1) -> dict[str, Any]:
    """A loop of Lightning's Fabric; gives the weights and how many rows this process saw."""
    fabric = L.Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    torch.manual_seed(0)
    module = nn.Linear(784, 1)
    network, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(ThreeSevenDataModule(batch_size=1000).train_dataloader())
    rows = 0
    for _ in range(2):
        for batch in loader:
            x, y = batch
            rows += len(y)
            loss = mean_squared_error(torch.sigmoid(network(x)), y, batch.divisor)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return {"weight": module.weight.detach(), "rows": rows}


def everything(devices: int) -> dict[str, Any]:
    """What test_anyone.py compares with one process."""
    results: dict[str, Any] = {}
    for batch_size in BATCH_SIZES:
        for network in NETWORKS:
            results[f"{network.__name__} {batch_size}"] = trained(network, batch_size, devices)
        for stranger in (linear, cnn):
            model = stranger()
            fit(model, ThreeSevenDataModule(batch_size=batch_size), devices)
            results[f"{stranger.__name__} {batch_size}"] = {"losses": model.losses, "rows": model.rows}

    for distribute in (True, False):
        torch.manual_seed(0)
        model = LitThreeSeven()
        fit(model, tensor_loader(), devices, use_distributed_sampler=distribute)
        results[f"tensors {distribute}"] = model.state_dict()

    model = linear()
    fit(model, ThreeSevenDataModule(batch_size=64), devices, overfit_batches=2, max_epochs=60)
    results["overfit"] = {"losses": model.losses, "batches": len(set(model.seen))}

    trainer = L.Trainer(devices=devices, strategy="ddp" if devices > 1 else "auto", **QUIET)
    predictions = trainer.predict(LitThreeSeven(), ThreeSevenDataModule(batch_size=500).predict_dataloader())
    results["predictions"] = torch.cat([batch["rows"] for batch in predictions]).tolist()

    results["fabric"] = fabric_loop(devices)
    return results


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    everywhere: list[Any] = [None] * int(sys.argv[1])
    results = everything(len(everywhere))
    distributed.all_gather_object(everywhere, results)
    if distributed.get_rank() == 0:
        torch.save(everywhere, sys.argv[2])
