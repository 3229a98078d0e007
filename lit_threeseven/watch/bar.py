"""`FitProgressBar`: how far training has come, at the terminal."""

import shutil
import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from typing_extensions import override


class FitProgressBar(ProgressBar):
    """One bar over all epochs of a fit, with the loss and the time left, on standard error if that is a terminal.

    Lightning's own bar starts again at each epoch, which is no use when an epoch is one batch. The loss is read only
    when the bar is drawn, at most ten times a second.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar = tqdm(disable=True)

    @override
    def disable(self) -> None:
        """Nothing to do: only the first process draws."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not sys.stderr.isatty():
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
        if self._bar.update(trainer.global_step - self._bar.n):  # it is time to redraw
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
