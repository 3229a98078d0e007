"""Train a grid of networks at once: every learning rate with every spread of starting weights and every seed.

    python scripts/sweep.py --lr 0.001,0.01,0.1,1,10,100 --seeds 8

All are columns of one W, so that one matrix product serves them all; each ends where it would alone. It writes a folder
with a table (table.csv), a figure (loss.png), the best network as a checkpoint of LitThreeSeven (best.ckpt), and what
TensorBoard shows: the figure, and in HPARAMS all networks side by side.
"""

import argparse
import copy
import csv
import itertools
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lit_threeseven import ThreeSevenDataModule
from lit_threeseven.networks import LitThreeSevenMany
from lit_threeseven.networks.many import check_memory
from lit_threeseven.run import WholeCheckpointIO
from lit_threeseven.run.options import silence_libraries
from lit_threeseven.watch import FitProgressBar, figures


def numbers(text: str) -> list[float]:
    """A list such as 0.1,1,10; raises ValueError for anything else."""
    return [float(part) for part in text.split(",")]


def parse(args: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=numbers, default=[1.0], help="learning rates, such as 0.1,1,10 (default: 1)")
    parser.add_argument("--init-std", type=numbers, default=[0.01], help="spreads of the start (default: 0.01)")
    parser.add_argument("--seeds", type=int, default=1, help="number of random starts, seeds 0, 1, … (default: 1)")
    parser.add_argument("--epochs", type=int, default=500, help="epochs (default: 500)")
    parser.add_argument("--batch-size", type=int, help="images per step (default: all)")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="fraction held out (default: 0.1)")
    parser.add_argument("--accelerator", default="auto", help="as in Lightning's Trainer (default: auto)")
    parser.add_argument("--devices", default="auto", help="number of devices (default: auto)")
    parser.add_argument("--out", default="logs", help="folder of all sweeps and of TensorBoard's runs (default: logs)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but mistakes")
    return parser.parse_args(args)


def sweep(options: argparse.Namespace) -> tuple[Path, list[dict[str, Any]]]:
    """Train the grid; gives the folder that was written, and the table.

    Raises:
        ValueError: If the grid is empty, has a network twice or one with an argument out of range, or does not fit into
            the memory.
    """
    if options.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {options.epochs}.")
    data = ThreeSevenDataModule(batch_size=options.batch_size, val_fraction=options.val_fraction)
    data.setup("fit")
    rows = min(options.batch_size or len(data.train), len(data.train))
    check_memory(len(options.lr) * len(options.init_std) * options.seeds, rows)  # before there is even a list of them
    models = list(itertools.product(options.lr, options.init_std, range(options.seeds)))
    many = LitThreeSevenMany(models, rows=rows)
    logger = TensorBoardLogger(options.out, "sweep", default_hp_metric=False)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        max_epochs=options.epochs,
        logger=logger,
        callbacks=[FitProgressBar()],
        plugins=[WholeCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=options.epochs,
    )
    start = copy.deepcopy(many)
    trainer.fit(many, data)
    measured = {"val": many.results} if options.val_fraction else {}
    train = data.train_dataloader()
    for networks in (start, many):
        trainer.validate(networks, train, verbose=False)
    measured["train"] = many.results
    diverged = many.diverged(start.results["loss"], many.results["loss"])
    table = [
        {"lr": lr, "init_std": init_std, "seed": seed}
        | {f"{part}_{name}": float(value[k]) for part, found in measured.items() for name, value in found.items()}
        | {"diverged": bool(diverged[k])}
        for k, (lr, init_std, seed) in enumerate(models)
    ]
    folder, by = Path(logger.log_dir), "val_loss" if options.val_fraction else "train_loss"
    best = min((k for k in range(len(models)) if not diverged[k]), key=lambda k: table[k][by], default=None)
    if best is not None:
        trainer.validate(many.single(best), train, verbose=False)
        trainer.save_checkpoint(folder / "best.ckpt", weights_only=True)
    if trainer.is_global_zero:
        write(folder, logger.experiment, many, table)
        if not options.quiet:
            print(f"{len(models)} networks, {int(diverged.sum())} of them diverged: {folder}")
        if best is not None and not options.quiet:
            chosen = ", ".join(f"{name} {value:.4g}" for name, value in table[best].items() if name != "diverged")
            print(f"The best by {by}: {chosen}")
    return folder, table


def write(folder: Path, writer: SummaryWriter, many: LitThreeSevenMany, table: list[dict[str, Any]]) -> None:
    """Write the table, the figure, and TensorBoard's entries."""
    with (folder / "table.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, table[0])
        rows.writeheader()
        rows.writerows(table)
    steps, losses = zip(*many.curve, strict=True)
    figure = figures.learning_curves([step + 1 for step in steps], torch.stack(losses), table)
    figure.savefig(folder / "loss.png", dpi=150)
    writer.add_figure("loss", figure)
    for row in table:
        recipe = {name: row[name] for name in ("lr", "init_std", "seed")}
        metrics = {name: float(value) for name, value in row.items() if name not in recipe}
        writer.add_hparams(recipe, metrics, run_name=" ".join(f"{name}={value:g}" for name, value in recipe.items()))
    writer.flush()


def main(args: list[str] | None = None) -> tuple[Path, list[dict[str, Any]]]:
    """Run the command line; a mistake ends it with a sentence."""
    silence_libraries()
    try:
        return sweep(parse(args))
    except (ValueError, TypeError, OSError, MisconfigurationException) as error:
        sys.exit(f"sweep: error: {error}")


if __name__ == "__main__":
    main()
