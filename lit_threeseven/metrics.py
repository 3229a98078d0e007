"""Loss, accuracy and AUROC over all rows of all processes, from whole numbers: the same bits in any order."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC

from lit_threeseven.functional import THRESHOLD, sum_of_squares
from lit_threeseven.whole import over_processes


def sums(probability: Tensor, y: Tensor) -> Tensor:
    """Sum of squared errors, number of right answers, and number of rows, ``(3,)``; the arguments are ``(N, 1)``."""
    right = ((probability >= THRESHOLD) == y.bool()).sum()
    squares = sum_of_squares(probability, y)
    return torch.stack([squares, right.to(squares.dtype), torch.full_like(squares, len(y))])


class MeanOfRows(Metric):
    """One of the first two `sums`, divided by the third."""

    full_state_update = False
    sums: Tensor

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which = which
        self.add_state("sums", torch.zeros(3), "sum")

    def update(self, probability: Tensor, y: Tensor) -> None:
        """Add rows, ``(N, 1)``; not in place, because states made in inference mode don't allow that."""
        self.sums = self.sums + sums(probability, y)

    def compute(self) -> Tensor:
        """The mean over all rows."""
        return (self.sums[self.which] / self.sums[2]).float()


class Curves(L.LightningModule):
    """Logs loss and accuracy of training batches: at the first step, and as often as the Trainer logs.

    If a callback or a scheduler watches one of them, that is at every step.
    """

    logged = False  # whether this step is; a number of steps here would be compiled anew at each by `torch.compile`
    _watched = False

    def on_train_start(self) -> None:
        """Look for callbacks and schedulers that watch a training metric."""
        super().on_train_start()
        trainer: Any = self.trainer  # whose attributes have no types
        watchers = [*trainer.callbacks, *trainer.lr_scheduler_configs]
        self._watched = any(str(getattr(watcher, "monitor", "")).startswith("train/") for watcher in watchers)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Decide whether this step is logged."""
        step, every = self.global_step, vars(self.trainer)["log_every_n_steps"]
        self.logged = self._watched or (bool(every) and (step == 0 or (step + 1) % every == 0))

    def log_curves(self, probability: Tensor, y: Tensor) -> None:
        """Log a batch's loss and accuracy over the rows of all processes; every process must call this."""
        squares, right, rows = over_processes(sums(probability, y))
        curves = {"train/loss": squares / rows, "train/accuracy": right / rows}
        self.log_dict(curves)
        if self.global_step == 0 and vars(self.trainer)["log_every_n_steps"] != 1:  # which Lightning leaves out
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in curves.items()}, 0)


def of_rows() -> nn.ModuleDict:
    """The three metrics of a stage."""
    return nn.ModuleDict({"loss": MeanOfRows(0), "accuracy": MeanOfRows(1), "auroc": BinaryAUROC(validate_args=False)})
