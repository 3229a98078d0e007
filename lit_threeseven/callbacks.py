"""What a person looks at while a Trainer runs: a bar at the terminal, pictures in TensorBoard."""

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lit_threeseven import figures
from lit_threeseven.batches import gather_objects

# Images in a grid.
GRID = 12
# What runs are compared by in TensorBoard's HPARAMS tab.
FINAL_METRICS = [f"{stage}/{name}" for stage in ("val", "test") for name in ("loss", "accuracy", "auroc")]


class FitProgressBar(ProgressBar):
    """One bar over all epochs of a fit, with the loss and the time left, on standard error.

    Lightning's own bars start anew each epoch, which is no use where an epoch is one batch. This one reads a loss that
    was logged anyway, a few times a second, so that no step waits for it. Validation, testing and prediction have no
    bar. It shows nothing where standard error is no terminal.

    Args:
        refresh_seconds: Time between two updates.

    Example:
        >>> trainer = L.Trainer(max_epochs=2000, callbacks=[FitProgressBar()])
    """

    def __init__(self, refresh_seconds: float = 0.2) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self._enabled = True
        self._progress: Progress | None = None
        self._next_refresh = 0.0

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def disable(self) -> None:
        """Don't show it; Lightning calls this on all processes but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        super().on_train_start(trainer, pl_module)
        console = Console(stderr=True)
        if not self._enabled or not console.is_terminal:
            return
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        self._progress = Progress(
            TextColumn("Training"),
            BarColumn(),
            TextColumn("epoch {task.fields[epoch]:,}" + (f" of {epochs:,}" if epochs else "")),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            auto_refresh=False,
        )
        self._progress.add_task(
            "fit", total=epochs, completed=trainer.current_epoch, epoch=trainer.current_epoch, loss=""
        )
        self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, if it is time to."""
        if self._progress and time.monotonic() >= self._next_refresh:
            self._update(trainer, trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)
            self._next_refresh = time.monotonic() + self.refresh_seconds

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last epoch and close the bar."""
        if self._progress:
            self._update(trainer, trainer.current_epoch)
            self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar where it stands."""
        self._close()

    def _update(self, trainer: L.Trainer, completed: float) -> None:
        loss = trainer.callback_metrics.get("train/loss")
        self._progress.update(
            self._progress.task_ids[0],
            completed=completed,
            epoch=int(completed),
            loss="" if loss is None else f"{loss:.4f}",
            refresh=True,
        )

    def _close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None


class TensorBoardPictures(Callback):
    """Show in TensorBoard how `LitThreeSeven` thinks.

    - At the start the recipe as text and hyper-parameters, the graph, and a grid of training images.
    - After 1, 10, 100, … epochs and at the end `W` as a picture, and histograms of `W` and its gradient.
    - Of the last validation, and of those after 10, 100, … epochs where time allows: the images with the highest
      loss, the confusion matrix, ROC and precision-recall curves. Without validation data training images are drawn,
      after 1, 10, 100, … and `max_epochs` epochs.
    - At a test the confusion matrix, ROC and precision-recall curves.

    Only the first process writes. Where the Trainer has no `TensorBoardLogger` nothing is drawn. A picture that fails
    is told in a warning, and ends the pictures, not the run.

    Args:
        share: Share of the training time, 0 to 1, above which drawing leaves out what need not be drawn.

    Attributes:
        seconds: Time that drawing has taken so far.

    Example:
        >>> trainer = L.Trainer(max_epochs=2000, callbacks=[TensorBoardPictures()])
    """

    def __init__(self, share: float = 0.02) -> None:
        super().__init__()
        self.share = share
        self._failed = False
        self.seconds = 0.0
        self._collected: list | None = None
        self._source = "", 0  # stage and step that it was collected in

    # When

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what is known beforehand."""
        self._start, self._collected = time.monotonic(), None
        self._weights_step = trainer.global_step - 1  # of the last weights that were drawn
        self._validated = trainer.current_epoch  # epochs at the last validation that was drawn
        if trainer.enable_validation:
            # otherwise Lightning asks for the validation data at the first validation, and until then nobody knows
            # whether there are any
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        self._draw(trainer, self._recipe, trainer, pl_module)
        if trainer.global_step == 0:
            self._draw(trainer, self._graph, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the first images and the weights; where there is no validation, collect and draw training images too."""
        if not self._due(trainer):
            return
        if trainer.global_step == 1:
            self._draw(trainer, self._examples, pl_module, batch)
        if trainer.is_last_batch:
            self._draw_weights(trainer, pl_module, trainer.current_epoch + 1)
        if not trainer.enable_validation or not any(trainer.num_val_batches):
            if batch_idx == 0:
                self._collected = []
            self._source = "train", trainer.global_step - 1
            with torch.no_grad():
                self._collect(pl_module(batch[0]), batch)
            if trainer.is_last_batch:
                self._draw_collected(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the weights and the validation that the training has ended with."""
        if trainer.global_step - 1 > self._weights_step:
            self._draw_weights(trainer, pl_module, trainer.current_epoch)
        self._draw_collected(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collect anew: any validation may be the last one."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        self._collected, self._source = [] if fitting else None, ("val", trainer.global_step - 1)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect what is drawn afterwards."""
        if isinstance(outputs, Tensor):
            self._collect(outputs, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the validation, if it is due and time allows."""
        if self._collected is None:
            return
        epochs = trainer.current_epoch + 1
        if len(str(epochs)) > len(str(self._validated)):  # a power of ten lies between them
            in_time = self.seconds <= self.share * (time.monotonic() - self._start)
            if trainer.strategy.broadcast(in_time):
                self._validated = epochs
                self._draw_collected(trainer, pl_module)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A test is always drawn."""
        self._collected, self._source = [], ("test", trainer.global_step)

    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the test."""
        self._draw_collected(trainer, pl_module)

    @staticmethod
    def _due(trainer: L.Trainer) -> bool:
        epochs = trainer.current_epoch + 1
        return epochs == trainer.max_epochs or epochs == 10 ** (len(str(epochs)) - 1)

    # What

    def _recipe(self, writer: SummaryWriter, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        recipe = {
            **pl_module.hparams,
            **(trainer.datamodule.hparams if trainer.datamodule else {}),
            "optimizer": type(trainer.optimizers[0]).__name__,
            "max_epochs": trainer.max_epochs,
            "devices": trainer.world_size,
            "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
        }
        recipe = {
            name: value if isinstance(value, int | float) else str(value)
            for name, value in recipe.items()
            if not name.startswith("_") and name not in ("data_dir", "pixels")  # which decide nothing
        }
        rows = "\n".join(f"| {name} | {value} |" for name, value in recipe.items())
        writer.add_text("recipe", f"| | |\n|---|---|\n{rows}", 0)
        for summary in hparams(recipe, dict.fromkeys(FINAL_METRICS, 0.0)):
            writer._get_file_writer().add_summary(summary)

    def _graph(self, writer: SummaryWriter, pl_module: L.LightningModule) -> None:
        # its parameters and its forward alone: metrics and the Trainer are not a part of the graph
        network = type(type(pl_module).__name__, (nn.Module,), {"forward": type(pl_module).forward})()
        for name, parameter in pl_module.named_parameters():
            setattr(network, name, parameter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tracing is deprecated, which TensorBoard's writer has to cope with
            writer.add_graph(network, torch.zeros(1, pl_module.W.shape[0], device=pl_module.device))

    def _examples(self, writer: SummaryWriter, pl_module: L.LightningModule, batch: Any) -> None:
        x, y, *_ = batch
        rows = torch.arange(min(GRID, len(y)), device=y.device)
        captions = [str(digit(value, pl_module.digits)) for value in y[rows]]
        writer.add_figure("train/examples", figures.images(x[rows], captions, "The first training images"), 0)

    def _draw_weights(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> None:
        self._weights_step = trainer.global_step - 1
        self._draw(trainer, self._weights, pl_module, epochs, self._weights_step)

    def _weights(self, writer: SummaryWriter, pl_module: L.LightningModule, epochs: int, step: int) -> None:
        if not pl_module.W.isfinite().all():
            return  # the run is about to end with a sentence
        first, second = pl_module.digits
        title = f"What makes a {first}, and what a {second}, after {epochs:,} epoch{'s' * (epochs > 1)}"
        writer.add_figure("W/picture", figures.weights(pl_module.W, pl_module.digits, title), step)
        writer.add_histogram("W/weights", pl_module.W, step)
        if pl_module.W.grad is not None:
            writer.add_histogram("W/gradient", pl_module.W.grad, step)

    def _collect(self, probability: Tensor, batch: Any) -> None:
        if self._collected is None:
            return
        x, y, *_ = batch
        hardest = (probability - y).abs().squeeze(1).topk(min(GRID, len(y))).indices
        self._collected.append([part.cpu() for part in (probability, y, x[hardest], probability[hardest], y[hardest])])

    def _draw_collected(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._collected is None:
            return
        shares = gather_objects(self._collected)
        self._collected = None
        parts = [torch.cat(part) for part in zip(*(batch for share in shares for batch in share), strict=True)]
        if parts:
            self._draw(trainer, self._evaluation, pl_module.digits, *self._source, *parts)

    def _evaluation(
        self,
        writer: SummaryWriter,
        digits: tuple[int, int],
        stage: str,
        step: int,
        probability: Tensor,
        y: Tensor,
        hard_x: Tensor,
        hard_probability: Tensor,
        hard_y: Tensor,
    ) -> None:
        if stage != "test":
            order = (hard_probability - hard_y).abs().squeeze(1).topk(min(GRID, len(hard_y))).indices
            captions = [
                f"is a {digit(truth, digits)}\nsays {said.item():.2f}"
                for truth, said in zip(hard_y[order], hard_probability[order], strict=True)
            ]
            title = f"The highest losses, and the probability of a {digits[0]}"
            writer.add_figure(f"{stage}/hardest", figures.images(hard_x[order].flatten(1), captions, title), step)
        writer.add_figure(f"{stage}/confusion_matrix", figures.confusion_matrix(probability, y, digits), step)
        writer.add_figure(f"{stage}/roc", figures.roc(probability, y, digits), step)
        writer.add_figure(f"{stage}/precision_recall", figures.precision_recall(probability, y, digits), step)
        writer.add_pr_curve(stage, y, probability, step)

    def _draw(self, trainer: L.Trainer, draw: Callable, *args: Any) -> None:
        logger = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
        if logger is None or not trainer.is_global_zero or self._failed or trainer.fast_dev_run:
            return
        start = time.monotonic()
        try:
            draw(logger.experiment, *args)
        except OSError:  # of a full disk, which the curves would meet next
            raise
        except Exception as error:
            self._failed = True
            rank_zero_warn(f"No more pictures for TensorBoard: {draw.__name__[1:]} failed with {error!r}.")
        self.seconds += time.monotonic() - start


def digit(label: Tensor, digits: tuple[int, int]) -> int:
    """The digit that a label means: 1 the first, 0 the second."""
    return digits[0] if label == 1 else digits[1]
