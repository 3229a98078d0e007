"""`LitThreeSeven`: the weights, the step, the metrics and the optimizer."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_threeseven import metrics
from lit_threeseven.batches import Batch, shared
from lit_threeseven.dataset import check_digits
from lit_threeseven.errors import UserError, check_positive
from lit_threeseven.functional import THRESHOLD, GradientDescent, linear, mean_squared_error, normal, sigmoid
from lit_threeseven.resumable import Resumable, plain

PIXELS = 28 * 28


class LitThreeSeven(metrics.Curves, Resumable):
    """One layer with one neuron: ``probability of a three = sigmoid(x W + b)``, trained by gradient descent.

    `W`, ``(784, 1)``, and `b`, ``(1,)``, are drawn from a normal distribution. After `lightning.seed_everything` or
    `torch.manual_seed`, they are the same bits on any machine. A batch is any pair ``(x, y)``, see `forward` and
    `mean_squared_error`. With a `ThreeSevenDataModule`, all results are the same bits on any number of devices;
    `lit_threeseven.whole` explains how.

    Args:
        lr: Learning rate of plain gradient descent, above 0.
        init_std: Standard deviation of the starting `W` and `b`, above 0.
        digits: The two digits to tell apart; `forward` gives the probability of the first.

    Raises:
        UserError: If an argument is out of its range.

    Example:
        >>> model = LitThreeSeven()
        >>> model(torch.zeros(5, 28, 28)).shape
        torch.Size([5, 1])
    """

    takes_bytes = True  # see `datamodule.takes_bytes`

    def __init__(self, lr: float = 1.0, init_std: float = 0.01, digits: tuple[int, int] = (3, 7)) -> None:
        super().__init__()
        digits = check_digits(digits)
        check_positive(lr=lr, init_std=init_std)
        self.save_hyperparameters()
        self.lr: float = plain(lr)
        self.digits = digits
        # torch's own normal numbers depend on the processor, its whole numbers don't
        self.add_weights(np.random.default_rng(int(torch.randint(2**63 - 1, ()))))
        self.example_input_array = torch.zeros(1, PIXELS)  # used by Lightning to trace the graph
        self.val_metrics, self.test_metrics = metrics.of_rows(), metrics.of_rows()

    def add_weights(self, random: np.random.Generator) -> None:
        """Add the parameters, with starting values from a generator."""
        self.W = nn.Parameter(normal(random, (PIXELS, 1), self.hparams["init_std"]))
        self.b = nn.Parameter(normal(random, (1,), self.hparams["init_std"]))

    def forward(self, x: Tensor) -> Tensor:
        """Probability that an image shows the first digit, a three.

        Args:
            x: Pixels, ``(N, 784)`` or ``(N, 28, 28)``: uint8, 0 to 255, or floating-point, in [0, 1].

        Returns:
            ``(N, 1)`` in [0, 1].
        """
        return sigmoid(self.logits(x))

    def logits(self, x: Tensor) -> Tensor:
        """The input of the sigmoid: ``x W + b``, ``(N, 1)``; above 0 for the first digit."""
        return linear(x, self.W, self.b)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Predict, and return the loss of a batch; Lightning computes the gradient, and the optimizer updates."""
        x, y, divisor = shared(batch, check=batch_idx == 0)
        probability = self(x)
        loss = mean_squared_error(probability, y, divisor)
        if self.logged:
            self.check_finite()
            self.log_curves(probability.detach(), y)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log loss, accuracy and AUROC of held-out images; return their probabilities, as `forward` does."""
        return self._evaluate(batch, batch_idx, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log loss, accuracy and AUROC of the test images; return their probabilities, as `forward` does."""
        return self._evaluate(batch, batch_idx, "test", self.test_metrics)

    def _evaluate(self, batch: Any, batch_idx: int, stage: str, found: Any) -> Tensor:
        x, y, _ = shared(batch, check=batch_idx == 0)
        probability = self(x)
        for metric in found.values():
            metric.update(probability, y)
        self.log_dict({f"{stage}/{name}": metric for name, metric in found.items()}, batch_size=len(y))
        return probability

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Probability and digit of each image.

        Args:
            batch: Pixels, or a sequence that begins with them; see `forward`.
            batch_idx: Unused.

        Returns:
            The "digit", ``(n, 1)`` int64: the second digit where the probability is below 0.5, otherwise the first; the
            "probability" of the first digit, ``(n, 1)``; and, for a `Batch`, the "rows" of the data, ``(n,)`` int64.
        """
        probability = self(batch if isinstance(batch, Tensor) else batch[0])
        first, second = self.digits
        answer = {"digit": torch.where(probability < THRESHOLD, second, first), "probability": probability}
        return answer | ({"rows": batch.rows} if isinstance(batch, Batch) else {})

    def configure_optimizers(self) -> Any:
        """Plain gradient descent: ``W -= lr * gradient``."""
        return GradientDescent(self.parameters(), lr=self.lr)

    def setup(self, stage: str) -> None:
        """Refuse data of other digits, whose labels would have another meaning.

        Raises:
            UserError: If the data module has other `digits`, or processes run different versions.
        """
        super().setup(stage)
        digits = getattr(vars(self.trainer).get("datamodule"), "digits", self.digits)
        if tuple(digits) != tuple(self.digits):
            raise UserError(f"The data has digits={digits}, and the network digits={self.digits}; make them the same.")
