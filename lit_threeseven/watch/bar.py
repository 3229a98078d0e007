"""`FitProgressBar`: how far training has come, at the terminal."""

import shutil
import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from typing_extensions import override


class FitProgressBar(ProgressBar):
    """One bar over all epochs of a fit, with the loss and the time left, on standard error if a person reads that.

    Lightning's own bar starts again at each epoch, which is no use when an epoch is one batch. The loss is read only
    when the bar is drawn, at most ten times a second.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self._bar = tqdm(disable=True)

    @property
    def is_disabled(self) -> bool:
        """The opposite of `is_enabled`."""
        return not self.is_enabled

    @override
    def enable(self) -> None:
        """Draw the bar, in a fit from its next step on."""
        self.is_enabled = True

    @override
    def disable(self) -> None:
        """Remove the bar, and draw none until `enable` is called."""
        self.is_enabled = False
        self._bar.leave = False
        self._bar.close()

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print as Python does, above the bar."""
        with self._bar.external_write_mode(kwargs.get("file")):
            print(*args, **kwargs)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open(trainer)

    def _open(self, trainer: L.Trainer) -> None:
        shown = sys.stderr.isatty() or "ipykernel" in sys.modules  # a notebook's output can go back to its line's start
        if self.is_disabled or not trainer.is_global_zero or not shown:
            return
        total = trainer.estimated_stepping_batches  # infinite if neither epochs nor steps have a limit
        columns, lines = shutil.get_terminal_size()  # left to tqdm, a terminal that doesn't report its size stays empty
        self._bar = tqdm(
            desc=_text(trainer, trainer.current_epoch + 1),
            total=total,
            initial=trainer.global_step,
            bar_format="Training |{bar:20}| {desc}" + (", {remaining} left" if total < float("inf") else ""),
            miniters=1,  # or tqdm would guess how often to look at the clock
            ncols=columns,
            nrows=lines,
        )

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar.disable:  # unless it has been enabled since
            self._open(trainer)
        elif self._bar.update(trainer.global_step - self._bar.n):  # it is time to redraw
            self._bar.set_description_str(_text(trainer, trainer.current_epoch + 1))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar.n = trainer.global_step
        self._bar.set_description_str(_text(trainer, trainer.current_epoch))
        self._bar.close()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._bar.close()


def _text(trainer: L.Trainer, epoch: int) -> str:
    of = f" of {trainer.max_epochs:,}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    loss = trainer.callback_metrics.get("train/loss")
    return f"epoch {epoch:,}{of}" + ("" if loss is None else f", loss {loss:.4f}")
