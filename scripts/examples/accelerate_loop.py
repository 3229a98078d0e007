"""A hand-written loop with Hugging Face Accelerate and this package's loader: each process takes its share of a batch.

pip install accelerate
torchrun --nproc-per-node 2 scripts/examples/accelerate_loop.py --rows logs/rows

With python instead of torchrun it runs as one process; so does accelerate launch on CPUs.
"""

import argparse
from pathlib import Path

import torch

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.errors import needed
from lit_threeseven.functional import mean_squared_error

with needed("Accelerate", "accelerate"):
    from accelerate import Accelerator


def main() -> None:
    """Train and test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="passes over the data (default: 2)")
    parser.add_argument("--rows", type=Path, help="folder for the row numbers that each process sees, RANK.csv")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    data = ThreeSevenDataModule(batch_size=64)
    # The loaders are not prepared: they divide each batch themselves, and Accelerate would divide the shares again.
    train, test = data.train_dataloader(), data.test_dataloader()
    network = LitThreeSeven()
    model, optimizer = accelerator.prepare(network, network.configure_optimizers())
    seen = []
    for epoch in range(args.epochs):
        for batch in train:
            optimizer.zero_grad()
            accelerator.backward(mean_squared_error(model(batch.x), batch.y, batch.divisor))
            optimizer.step()
            seen += [f"{epoch},{row}" for row in batch.rows.tolist()]
    right = torch.tensor(0)
    for batch in test:
        right += ((network(batch.x) >= 0.5) == batch.y).sum()
        seen += [f"test,{row}" for row in batch.rows.tolist()]
    right = accelerator.reduce(right)
    accelerator.print(f"{right:,} of {len(data.test):,} test images right")
    if args.rows:
        args.rows.mkdir(parents=True, exist_ok=True)
        (args.rows / f"{accelerator.process_index}.csv").write_text("\n".join(["epoch,row", *seen, ""]))
    accelerator.end_training()


if __name__ == "__main__":
    main()
