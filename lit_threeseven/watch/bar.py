"""`FitProgressBar`: the progress of training, at the terminal, in a notebook, and in a log file."""

import io
import shutil
import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from typing_extensions import override


class FitProgressBar(ProgressBar):
    """One bar over all epochs of a fit, with the loss and the time left, on standard error.

    In a notebook it is one line that is updated; in a log file there is a line for every tenth of the run. Lightning's
    own bar starts again at each epoch, which is useless when an epoch is one batch. The loss is read only when it is
    shown, at most ten times a second.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self._bar = tqdm(disable=True)
        self._total = 0.0  # steps of the run
        self._tenth = 10  # tenths of the run that a log file has lines for; 10 means nothing to add

    @property
    def is_disabled(self) -> bool:
        """The opposite of `is_enabled`."""
        return not self.is_enabled

    @override
    def enable(self) -> None:
        """Draw the bar; during a fit, from its next step on."""
        self.is_enabled = True

    @override
    def disable(self) -> None:
        """Remove the bar, and draw none until `enable` is called."""
        self.is_enabled = False
        self._bar.leave = False
        self._bar.close()

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar, with the arguments of Python's `print`."""
        with self._bar.external_write_mode(kwargs.get("file")):
            print(*args, **kwargs)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open(trainer)

    def _open(self, trainer: L.Trainer) -> None:
        if self.is_disabled or not trainer.is_global_zero:
            return
        notebook = "ipykernel" in sys.modules and sys.modules["IPython"].get_ipython()
        self._total = total = trainer.estimated_stepping_batches  # infinite if neither epochs nor steps have a limit
        if not notebook and not sys.stderr.isatty():
            self._tenth = int(10 * trainer.global_step / total)
            return
        # left to tqdm, a terminal that doesn't report its size stays empty; Python 3.10 says that it is 0 × 0
        columns, lines = shutil.get_terminal_size()
        self._bar = tqdm(
            desc=_text(trainer, trainer.current_epoch + 1),
            total=total,
            initial=trainer.global_step,
            bar_format="Training |{bar:20}| {desc}" + (", {remaining} left" if total < float("inf") else ""),
            miniters=1,  # otherwise tqdm guesses how often to look at the clock
            ncols=columns or 80,
            nrows=lines or 24,
            file=_Cell() if notebook else sys.stderr,
        )

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._tenth < 10:
            self._line(trainer)
        elif self._bar.disable:  # unless it has been enabled since
            self._open(trainer)
        elif self._bar.update(trainer.global_step - self._bar.n):  # it is time to redraw
            self._bar.set_description_str(_text(trainer, trainer.current_epoch + 1))

    def _line(self, trainer: L.Trainer) -> None:
        tenth = int(10 * trainer.global_step / self._total)
        if tenth > self._tenth and self.is_enabled:
            print(f"Training: {_text(trainer, trainer.current_epoch + 1)}", file=sys.stderr, flush=True)
        self._tenth = tenth

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar.n = trainer.global_step
        self._bar.set_description_str(_text(trainer, trainer.current_epoch))
        self._bar.close()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._bar.close()


class _Cell(io.StringIO):
    """A notebook's output that shows the last line written."""

    encoding = "utf-8"  # tqdm asks for it

    def __init__(self) -> None:
        from IPython.display import display

        super().__init__()
        self.shown: Any = display({"text/plain": ""}, raw=True, display_id=True)

    @override
    def write(self, text: str) -> int:
        if text.strip():
            self.shown.update({"text/plain": text.strip()}, raw=True)
        return len(text)


def _text(trainer: L.Trainer, epoch: int) -> str:
    of = f" of {trainer.max_epochs:,}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    loss = trainer.callback_metrics.get("train/loss")
    return f"epoch {epoch:,}{of}" + ("" if loss is None else f", loss {loss:.4f}")
