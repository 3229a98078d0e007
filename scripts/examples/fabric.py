"""A hand-written loop with Lightning Fabric: the main recipe gives the same bits on any number of processes.

pip install .        # Fabric is part of Lightning
python scripts/examples/fabric.py --devices 2
"""

import argparse

import lightning as L
import torch

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.batches import Batches
from lit_threeseven.whole import over_processes


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="CPU processes (default: 2)")
    parser.add_argument("--epochs", type=int, default=2000, help="passes over the data (default: 2000)")
    args = parser.parse_args()
    fabric = L.Fabric(accelerator="cpu", devices=args.devices, strategy="ddp")
    fabric.launch()
    fabric.seed_everything(0)
    data = ThreeSevenDataModule()
    data.setup()
    train, test = fabric.setup_dataloaders(*(Batches(part, as_bytes=True) for part in (data.train, data.test)))
    # For bytes the gradient is already that of all processes; DDP is not used, since its mean would round it.
    model = fabric.to_device(LitThreeSeven())
    optimizer = model.configure_optimizers()
    for _ in range(args.epochs):
        for i, batch in enumerate(train):
            optimizer.zero_grad()
            fabric.backward(model.training_step(batch, i))
            optimizer.step()
    with torch.no_grad():
        right = over_processes(sum(((model(x) >= 0.5) == y).sum() for x, y in test))
    fabric.print(f"{right:,} of {len(data.test):,} test images right\ndigest {model.digest()}")


if __name__ == "__main__":
    main()
