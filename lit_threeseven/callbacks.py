"""What a person looks at while a Trainer runs."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


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
