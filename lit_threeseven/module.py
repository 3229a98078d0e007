"""`LitThreeSeven`: the weights, the step, the metrics and the optimizer."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

from lit_threeseven.errors import UserError
from lit_threeseven.functional import mean_squared_error, sigmoid

PIXELS = 28 * 28

# An image is the second digit below this probability, otherwise the first.
THRESHOLD = 0.5
# torchmetrics asks for more than its threshold, so it gets the float32 number just below.
METRIC_THRESHOLD = THRESHOLD - 2**-25


class LitThreeSeven(L.LightningModule):
    """One layer with one neuron: ``probability of a three = sigmoid(x W + b)``, trained by gradient descent.

    `W`, ``(784, 1)``, and `b`, ``(1,)``, are drawn from a normal distribution with torch's global random generator, so
    `lightning.seed_everything` or `torch.manual_seed` before construction makes them reproducible.

    A training batch is ``(x, y)`` or ``(x, y, rows)``, see `lit_threeseven.batches.Batch`.

    Args:
        lr: Learning rate of plain gradient descent, above 0.
        init_std: Standard deviation of the starting `W` and `b`, above 0.
        digits: The two digits that are told apart; the first is what `forward` gives the probability of.

    Raises:
        UserError: If an argument is out of its range.

    Example:
        >>> model = LitThreeSeven()
        >>> model(torch.zeros(5, 28, 28)).shape
        torch.Size([5, 1])
    """

    def __init__(self, lr: float = 1.0, init_std: float = 0.01, digits: tuple[int, int] = (3, 7)) -> None:
        super().__init__()
        digits = tuple(digits)
        for name, value, usual in (("lr", lr, "1.0"), ("init_std", init_std, "0.01")):
            if not 0 < value <= torch.finfo(torch.float32).max:
                raise UserError(f"{name} must be a finite float32 above 0, such as {usual}, got {value}.")
        self.save_hyperparameters()
        self.lr, self.digits = lr, digits
        self.W = nn.Parameter(torch.randn(PIXELS, 1) * init_std)
        self.b = nn.Parameter(torch.randn(1) * init_std)

        # The share of this process and those of all others count as one batch.
        self.train_accuracy = BinaryAccuracy(METRIC_THRESHOLD, validate_args=False, dist_sync_on_step=True)
        metrics = MetricCollection(
            {
                "loss": MeanSquaredError(),
                "accuracy": BinaryAccuracy(METRIC_THRESHOLD, validate_args=False),
                "auroc": BinaryAUROC(validate_args=False),
            }
        )
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val/"), metrics.clone(prefix="test/")

    def forward(self, x: Tensor) -> Tensor:
        """Probability that an image shows the first digit, a three.

        Args:
            x: Pixels in [0, 1], ``(N, 784)`` or ``(N, 28, 28)``, float32.

        Returns:
            ``(N, 1)`` in [0, 1].
        """
        return sigmoid(x.flatten(1) @ self.W + self.b)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Prediction and loss of one batch; Lightning does the gradient and the update."""
        x, y, *rows = batch
        probability = self(x)
        loss = mean_squared_error(probability, y, *rows)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self._check_finite()
            self.train_accuracy(probability, y)
            self.log("train/loss", loss, sync_dist=True)
            self.log("train/accuracy", self.train_accuracy)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss, accuracy and AUROC of held-out images."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss, accuracy and AUROC of the test images."""
        self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: Any, metrics: MetricCollection) -> None:
        x, y, *_ = batch
        metrics.update(self(x), y)
        self.log_dict(metrics, batch_size=len(y))

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Probability and digit of each image.

        Args:
            batch: Pixels, or a sequence that begins with them; see `forward`.
            batch_idx: Unused.

        Returns:
            "probability" of the first digit, ``(N, 1)``, and the "digit", ``(N, 1)`` int64: the second digit where the
            probability is below 0.5, otherwise the first.
        """
        probability = self(batch if isinstance(batch, Tensor) else batch[0])
        first, second = self.digits
        return {"probability": probability, "digit": torch.where(probability < THRESHOLD, second, first)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent: ``W -= lr * gradient``."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are no numbers any more."""
        self._check_finite()

    def on_train_end(self) -> None:
        """Refuse to end a training with weights that are no numbers any more."""
        self._check_finite()

    def _check_finite(self) -> None:
        # A loss that is not finite leaves such weights behind, and unlike it these are the same on every process.
        if not all(parameter.isfinite().all() for parameter in self.parameters()):
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise UserError(
                f"The loss became non-finite within {self.global_step} steps at learning rate {lr}; "
                f"choose a smaller one, or a smaller init_std than {self.hparams.init_std}."
            )
