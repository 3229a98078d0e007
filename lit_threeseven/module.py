"""`LitThreeSeven`: the weights, the step, the metrics and the optimizer."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC
from torchmetrics.functional.classification import binary_accuracy

from lit_threeseven.batches import Batch, join_shares, mean_over_processes
from lit_threeseven.errors import UserError
from lit_threeseven.functional import gradient, mean_squared_error, sigmoid

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

    def on_fit_start(self) -> None:
        """Refuse a gradient scaler, which `backward` would not see.

        Raises:
            UserError: If the Trainer's precision is "16-mixed" on a GPU.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None):
            raise UserError(
                "precision=16-mixed scales the loss to derive small gradients in float16, and this network's gradient "
                "is written out in float32; choose precision 32-true or bf16-mixed."
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Prediction and loss of one batch; `backward` does the gradient, and the optimizer the update."""
        x, y, rows = batch if len(batch) == 3 else (*batch, len(batch[1]))
        with torch.no_grad():
            probability = self(x)
            loss = mean_squared_error(probability, y, rows)
        self._step = x.flatten(1), probability, y, rows
        every = self.trainer.log_every_n_steps
        if every and (self.global_step + 1) % every == 0:
            self._check_finite()
            accuracy = loss.new_zeros(())  # of an empty share, which torchmetrics does not take
            if len(y):
                share = len(y) / rows  # makes the mean over processes that of the rows
                accuracy = binary_accuracy(probability, y, METRIC_THRESHOLD, validate_args=False) * share
            self.log_dict({"train/loss": loss, "train/accuracy": accuracy}, sync_dist=True)
        return loss

    def backward(self, loss: Tensor) -> None:
        """The gradient of the loss by `W` and `b`, written out: that takes less time than to have it derived.

        It is averaged over the processes here. A subclass that predicts otherwise writes its own `training_step`, and
        takes `LightningModule.backward` back.
        """
        gradients = mean_over_processes(*gradient(*self._step))
        self._step = None
        for parameter, step in zip((self.W, self.b), gradients, strict=True):
            step /= self.trainer.accumulate_grad_batches
            parameter.grad = step if parameter.grad is None else parameter.grad + step

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log loss, accuracy and AUROC of held-out images; gives their probabilities, as `forward` does."""
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log loss, accuracy and AUROC of the test images; gives their probabilities, as `forward` does."""
        return self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: Any, metrics: MetricCollection) -> Tensor:
        x, y, *_ = batch
        probability = self(x)
        if len(y):
            metrics.update(probability, y)
        self.log_dict(metrics, batch_size=len(y))
        return probability

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Probability and digit of each image.

        Args:
            batch: Pixels, or a sequence that begins with them; see `forward`.
            batch_idx: Unused.

        Returns:
            "probability" of the first digit, ``(N, 1)``, and the "digit", ``(N, 1)`` int64: the second digit where the
            probability is below 0.5, otherwise the first. With several processes each returns the whole of a
            `lit_threeseven.batches.Batch`, in order, not its own share only.
        """
        probability = self(batch if isinstance(batch, Tensor) else batch[0])
        if isinstance(batch, Batch):
            probability = join_shares(probability, batch.rows)
        first, second = self.digits
        return {"probability": probability, "digit": torch.where(probability < THRESHOLD, second, first)}

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute, as ever."""
        if name == "_current_fx_name":
            # Lightning notes the running hook some fifty times a step; nn.Module's own way takes a tenth of the step
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent: ``W -= lr * gradient``."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are no numbers any more, and note the optimizer's name."""
        self._check_finite()
        checkpoint["optimizer"] = type(self.trainer.optimizers[0]).__name__

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
