"""`TensorBoardPictures`: the recipe, the weights and the images of a run, in TensorBoard and other loggers."""

import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor, distributed
from torch.utils.tensorboard import SummaryWriter
from typing_extensions import override

from lit_threeseven.functional import scale
from lit_threeseven.module import LitThreeSeven
from lit_threeseven.watch import figures
from lit_threeseven.watch.loggers import add_figure, add_recipe, attempt

GRID = 12  # images in a grid


class TensorBoardPictures(L.Callback):
    """Show in TensorBoard what `LitThreeSeven`, or a subclass, learns; for any other module, show only the recipe.

    The pictures' tags begin with "views" and "weights", which TensorBoard shows last. It first shows copies of the loss
    curves, "Loss/train" and "Loss/val".

    - At the start: the recipe, as text and in the HPARAMS tab, and a grid of training images.
    - After 1, 10, 100, … epochs and at the end: `W` as a picture, and histograms of `W` and its gradient.
    - At the end, from the last validation: the images with the highest loss, the confusion matrix, ROC and
      precision-recall curves. After a test: the same, without images.

    Other loggers get the recipe too, and the pictures if they can store them, see `watch.loggers`. Only the first
    process writes. If a picture fails, there is one warning and no more pictures of its kind; all others, and training,
    continue.
    """

    def __init__(self) -> None:
        super().__init__()
        self._failed: set[str] = set()  # kinds of pictures
        self._collected: list[tuple[Tensor, Tensor]] = []  # see `_collect`

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._collected = []
        self._weights_step = trainer.global_step  # when weights were last drawn
        self._each(trainer, "recipe", Logger, lambda logger: add_recipe(logger, recipe_of(trainer)))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        epochs = trainer.current_epoch + 1
        if getattr(pl_module, "logged", False):
            self._loss(trainer, "train")
        if trainer.current_epoch == batch_idx == 0:
            self._figure(trainer, "views/train examples", 0, examples, pl_module, batch)
        if trainer.is_last_batch and (epochs == trainer.max_epochs or math.log10(epochs).is_integer()):
            self._weights(trainer, pl_module, epochs)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._weights_step:
            self._weights(trainer, pl_module, trainer.current_epoch)
        self._draw_collected(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._loss(trainer, "val")

    def _loss(self, trainer: L.Trainer, stage: str) -> None:
        loss = trainer.callback_metrics.get(f"{stage}/loss")
        if loss is not None and trainer.is_global_zero:
            step = trainer.global_step - 1
            self._write(trainer, f"Loss/{stage}", lambda writer: writer.add_scalar(f"Loss/{stage}", loss.item(), step))

    @override
    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **_: Any) -> None:
        self._try(trainer, "rows", self._collect, trainer, *args)

    on_test_batch_end = on_validation_batch_end

    def _collect(self, trainer: L.Trainer, probability: Any, batch: Any, *indices: int) -> None:
        """Keep probability and label of all rows, ``(n, 2)``, and the same with pixels of the hardest, ``(m, 786)``."""
        if not any(indices):  # start over: any validation may be the last one
            self._collected = []
            self._stage = "test" if trainer.testing else "val"
            self._step = trainer.global_step - (not trainer.testing)  # that of the last update, as for the curves
        x, y, *_ = batch
        if isinstance(probability, Tensor) and probability.shape == y.shape and len(y):
            rows = torch.cat([probability, y], dim=1).float()
            hardest = hardest_first(rows)
            self._collected.append((rows.cpu(), torch.cat([rows[hardest], scale(x[hardest]).flatten(1)], dim=1).cpu()))

    def _draw_collected(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the rows of all processes; every process must call this, even one without rows."""
        shares, self._collected = [self._collected] * trainer.world_size, []
        if trainer.world_size > 1:
            distributed.all_gather_object(shares, shares[0])
        collected = [part for share in shares for part in share]
        if not collected:
            return
        rows, hardest = (torch.cat(parts) for parts in zip(*collected, strict=True))
        probability, y, stage, step = rows[:, :1], rows[:, 1:], self._stage, self._step
        if stage != "test":
            self._figure(trainer, f"views/{stage} hardest", step, hardest_images, pl_module, hardest)
        for kind in get_args(figures.Kind):
            self._figure(
                trainer, f"views/{stage} {kind}", step, figures.quality, kind, probability, y, pl_module.digits
            )
        self._write(trainer, "pr_curve", SummaryWriter.add_pr_curve, stage, y, probability, step)

    on_test_epoch_end = _draw_collected

    def _figure(self, trainer: L.Trainer, tag: str, step: int, draw: Callable[..., Figure], *args: Any) -> None:
        drawn = cache(lambda: draw(*args))  # once, for the first logger that takes it
        self._each(trainer, tag, Logger, lambda logger: add_figure(logger, tag, drawn, step))

    def _write(self, trainer: L.Trainer, tag: str, write: Callable[..., None], *args: Any) -> None:
        self._each(trainer, tag, TensorBoardLogger, lambda logger: write(logger.experiment, *args))

    def _each(self, trainer: L.Trainer, tag: str, which: type, work: Callable[[Any], None]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, which) and trainer.is_global_zero:
                attempt(logger, self._try, trainer, tag, work, logger)

    def _try(self, trainer: L.Trainer, tag: str, work: Callable[..., None], *args: Any) -> None:
        kind = tag.split(" ")[-1]  # the same for validation and test
        if kind in self._failed or not (kind == "recipe" or isinstance(trainer.lightning_module, LitThreeSeven)):
            return
        try:
            work(*args)
        except OSError:  # a full disk, or a server that is gone
            raise
        except Exception as error:
            self._failed.add(kind)
            rank_zero_warn(f"There will be no more pictures such as {tag!r}, which failed with {error!r}.")

    def _weights(self, trainer: L.Trainer, module: Any, epochs: int) -> None:
        """Show the first layer's weights as a picture, and histograms of every layer's weights and gradient."""
        self._weights_step, step = trainer.global_step, trainer.global_step - 1
        layers = {name: W for name, W in module.named_parameters() if W.ndim == 2}
        if not layers or not all(W.isfinite().all() for W in layers.values()):
            return
        self._write(trainer, "weights/histogram", write_histograms, layers, step)
        name, W = next(iter(layers.items()))
        self._figure(trainer, f"weights/{name} picture", step, weights, W, module, f"{name} after epoch {epochs:,}")


def hardest_first(rows: Tensor) -> Tensor:
    """Indices of the rows with the highest loss, at most `GRID`; rows begin with probability and label, ``(N, 2+)``."""
    return (rows[:, 0] - rows[:, 1]).abs().topk(min(GRID, len(rows))).indices


def examples(module: LitThreeSeven, batch: Any) -> Figure:
    """Draw the first images of a batch with their digits."""
    x, y, *_ = batch
    rows = torch.arange(min(GRID, len(y)), device=y.device)
    captions = [str(module.digits[int(label == 0)]) for label in y[rows]]
    return figures.images(scale(x[rows]), captions, "The first training images")


def hardest_images(module: LitThreeSeven, rows: Tensor) -> Figure:
    """Draw the hardest of some rows, ``(N, 786)`` with probability, label and pixels."""
    rows = rows[hardest_first(rows)]
    captions = [f"is a {module.digits[int(y == 0)]}\nsays {said:.2f}" for said, y in rows[:, :2].tolist()]
    return figures.images(rows[:, 2:], captions, f"The highest losses, and the probability of a {module.digits[0]}")


def weights(W: Tensor, module: LitThreeSeven, title: str) -> Figure:
    """Draw the weights of a first layer, of one unit or of several."""
    return figures.weights(W, module.digits, title) if W.shape[1] == 1 else figures.units(W, title)


def write_histograms(writer: SummaryWriter, layers: dict[str, Tensor], step: int) -> None:
    """Write histograms of the layers' weights and of their gradients."""
    for name, W in layers.items():
        writer.add_histogram(f"weights/{name}", W.float(), step)
        if W.grad is not None:
            writer.add_histogram(f"weights/{name} gradient", W.grad.float(), step)


def recipe_of(trainer: L.Trainer) -> dict[str, int | float | str]:
    """The settings that decide the result of a run, in TensorBoard's order."""
    recipe: dict[str, Any] = {}
    for optimizer in trainer.optimizers[:1]:
        group = optimizer.param_groups[0]
        recipe["lr"] = float(group.get("initial_lr", group["lr"]))  # a scheduler changes "lr" and keeps the initial one
        recipe["optimizer"] = type(optimizer).__name__
    recipe["max_epochs"] = trainer.max_epochs
    data = getattr(getattr(trainer, "datamodule", None), "hparams", {})
    recipe = {**recipe, **{**trainer.lightning_module.hparams, **data, **recipe}}
    recipe["seed_everything"] = os.environ.get("PL_GLOBAL_SEED")
    decisive = {name for name in recipe if name[0] != "_"} - {"data_dir", "digits", "source"}  # the others are not
    recipe = {name: value for name, value in recipe.items() if name in decisive}
    return {name: value if isinstance(value, int | float) else str(value) for name, value in recipe.items()}
