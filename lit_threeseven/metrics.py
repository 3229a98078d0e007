"""Loss, accuracy and AUROC of all rows of all processes, from whole numbers: the same bits whatever the order."""

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC

from lit_threeseven.functional import THRESHOLD, sum_of_squares


def sums(probability: Tensor, y: Tensor) -> Tensor:
    """Sum of squared errors, number of right decisions, and number of rows, ``(3,)``, of ``(N, 1)``."""
    right = ((probability >= THRESHOLD) == y.bool()).sum()
    squares = sum_of_squares(probability - y)
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
        """Add rows, ``(N, 1)``; not in place, as a state that was made in inference mode doesn't allow that."""
        self.sums = self.sums + sums(probability, y)

    def compute(self) -> Tensor:
        """The mean over all rows."""
        return (self.sums[self.which] / self.sums[2]).float()


def of_rows() -> nn.ModuleDict:
    """The three metrics of a stage."""
    return nn.ModuleDict({"loss": MeanOfRows(0), "accuracy": MeanOfRows(1), "auroc": BinaryAUROC(validate_args=False)})
