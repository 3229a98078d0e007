"""`sweep`: many networks at once, as the columns of one `W`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_threeseven import signals

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from lit_threeseven.networks import LitThreeSevenMany


def sweep(
    lr: list[float] = [1.0],  # noqa: B006  # the command shows it
    init_std: list[float] = [0.01],  # noqa: B006
    seeds: int = 1,
    epochs: int = 500,
    batch_size: int | None = None,
    val_fraction: float = 0.1,
    accelerator: str = "auto",
    devices: int | str = "auto",
    out: str = "sweeps",
) -> tuple[Path, list[dict[str, Any]]]:
    """Train many networks at once: every learning rate with every spread of starting weights and every seed.

    All are columns of one W, so one matrix product trains them all; each ends where it would alone. It writes a folder
    with a table (table.csv), a figure (loss.png), the best network as a checkpoint of LitThreeSeven (best.ckpt), and
    data for TensorBoard: the figure, and under HPARAMS all networks side by side.

    Args:
        lr: Learning rates, such as 0.1,1,10.
        init_std: Standard deviations of the starting weights, such as 0.01,1.
        seeds: Number of random starts; their seeds are 0, 1, ….
        epochs: Number of epochs.
        batch_size: Images per step; all by default.
        val_fraction: Fraction of the training images held out.
        accelerator: As in Lightning's Trainer.
        devices: Number of devices.
        out: Folder of all sweeps.

    Returns:
        The folder that was written, and the table: a row for each network.

    Raises:
        UserError: If the grid is empty, contains a network twice, has an argument out of range, or does not fit into
            memory.
    """
    import copy
    import itertools

    import lightning as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.loggers import TensorBoardLogger

    from lit_threeseven.checkpoints import WholeCheckpointIO
    from lit_threeseven.datamodule import ThreeSevenDataModule
    from lit_threeseven.errors import UserError, silence_libraries
    from lit_threeseven.networks import LitThreeSevenMany
    from lit_threeseven.networks.many import check_memory
    from lit_threeseven.watch import FitProgressBar

    silence_libraries()
    if epochs < 1:
        raise UserError(f"--epochs must be at least 1, got {epochs}.")
    data = ThreeSevenDataModule(batch_size=batch_size, val_fraction=val_fraction)
    data.setup("fit")
    rows = min(batch_size or len(data.train), len(data.train))
    check_memory(len(lr) * len(init_std) * seeds, rows)  # before even a list of them is made
    models = list(itertools.product(lr, init_std, range(seeds)))
    many = LitThreeSevenMany(models, rows=rows)
    logger = TensorBoardLogger(out, "", default_hp_metric=False)
    try:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            max_epochs=epochs,
            logger=logger,
            callbacks=[FitProgressBar()],
            plugins=[WholeCheckpointIO()],
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=epochs,
        )
    except (TypeError, MisconfigurationException) as error:
        raise UserError(str(error)) from error
    start = copy.deepcopy(many)
    trainer.fit(many, data)
    measured = {"val": many.results} if val_fraction else {}
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
    folder, by = Path(logger.log_dir), "val_loss" if val_fraction else "train_loss"
    best = min((k for k in range(len(models)) if not diverged[k]), key=lambda k: table[k][by], default=None)
    if best is not None:
        trainer.validate(many.single(best), train, verbose=False)
        trainer.save_checkpoint(folder / "best.ckpt", weights_only=True)
    if trainer.is_global_zero:
        write(folder, logger.experiment, many, table)
    return folder, table


def write(folder: Path, writer: "SummaryWriter", many: "LitThreeSevenMany", table: list[dict[str, Any]]) -> None:
    """Write the table, the figure, and TensorBoard's entries."""
    import csv

    import torch

    from lit_threeseven.watch import figures

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
        metrics = {name.replace("_", "/"): float(value) for name, value in row.items() if name not in recipe}
        writer.add_hparams(recipe, metrics, run_name=" ".join(f"{name}={value:g}" for name, value in recipe.items()))
    writer.flush()


def show(result: tuple[Path, list[dict[str, Any]]]) -> None:
    """Print the sweep's folder and its best network."""
    if signals.local_rank():
        return
    folder, table = result
    finite = [row for row in table if not row["diverged"]]
    print(f"{len(table)} networks, {len(table) - len(finite)} of them diverged: {folder}")
    if finite:
        by = "val_loss" if "val_loss" in table[0] else "train_loss"
        best = min(finite, key=lambda row: row[by])
        print(f"The best by {by}: {', '.join(f'{name} {best[name]:.4g}' for name in best if name != 'diverged')}")
