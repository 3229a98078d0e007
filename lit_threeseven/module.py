"""`LitThreeSeven`: the weights, the step, the metrics and the optimizer."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torchmetrics import MeanMetric, MeanSquaredError
from torchmetrics.classification import BinaryAUROC
from torchmetrics.utilities.distributed import gather_all_tensors

from lit_threeseven import exact
from lit_threeseven.batches import Batch
from lit_threeseven.dataset import check_digits
from lit_threeseven.functional import check_positive, mean_squared_error, normal, sigmoid
from lit_threeseven.pixels import WholePixels
from lit_threeseven.weights import WeightsFromFile

PIXELS = 28 * 28

# Below this probability an image is taken for the second digit, otherwise for the first.
THRESHOLD = 0.5


class LitThreeSeven(WeightsFromFile):
    """One layer with one neuron: ``probability of a three = sigmoid(x W + b)``, trained by gradient descent.

    `W`, ``(784, 1)``, and `b`, ``(1,)``, are drawn from a normal distribution. `lightning.seed_everything` or
    `torch.manual_seed` before construction makes them reproducible, to the same bits on any machine.

    A batch is any pair ``(x, y)``, see `forward` and `mean_squared_error`. With a ``Trainer(deterministic=True)`` on a
    `ThreeSevenDataModule` all results are the same bits on any number of devices, see `exact`.

    Args:
        lr: Learning rate of plain gradient descent, above 0.
        init_std: Standard deviation of the starting `W` and `b`, above 0.
        digits: The two digits to tell apart; `forward` gives the probability of the first.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> model = LitThreeSeven()
        >>> model(torch.zeros(5, 28, 28)).shape
        torch.Size([5, 1])
    """

    # It lets `ThreeSevenDataModule` send a `SparsePixels` or `WholePixels` as x. Subclasses don't inherit it: they get
    # tensors, unless they set it themselves.
    takes_sparse_pixels = True

    def __init__(self, lr: float = 1.0, init_std: float = 0.01, digits: tuple[int, int] = (3, 7)) -> None:
        super().__init__()
        digits = check_digits(digits)
        check_positive(lr=lr, init_std=init_std)
        self.save_hyperparameters()
        self.lr, self.digits = lr, digits
        # torch's own normal numbers depend on the processor, its whole numbers don't
        self.add_weights(np.random.default_rng(int(torch.randint(2**63 - 1, ()))))
        self.val_metrics, self.test_metrics = _metrics(), _metrics()
        self.is_exact = self._monitored = False

    def add_weights(self, random: np.random.Generator) -> None:
        """Add the parameters, with starting values from a generator."""
        self.W, self.b = (
            nn.Parameter(normal(random, shape, self.hparams["init_std"])) for shape in ((PIXELS, 1), (1,))
        )

    @property
    def example_input_array(self) -> Tensor:
        """One blank image, used by Lightning to trace the graph."""
        return next(self.parameters()).new_zeros(1, PIXELS)

    def forward(self, x: Tensor) -> Tensor:
        """Probability that an image shows the first digit, a three.

        Args:
            x: Pixels in [0, 1], ``(N, 784)`` or ``(N, 28, 28)``, float32.

        Returns:
            ``(N, 1)`` in [0, 1].
        """
        if isinstance(x, WholePixels):
            return exact.probability(x, self.W, self.b).float()
        return sigmoid(self.logits(x))

    def logits(self, x: Tensor) -> Tensor:
        """What the sigmoid makes a probability of: ``x W + b``, ``(N, 1)``; above 0 for the first digit."""
        return x.flatten(1) @ self.W + self.b

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Prediction and loss of one batch; Lightning takes the gradient, and the optimizer updates."""
        x, y = batch
        whole = isinstance(x, WholePixels)
        if whole:
            loss, accuracy = exact.Step.apply(self.W, self.b, batch)
        else:
            probability = self(x)
            divisor = getattr(batch, "divisor", len(y))
            loss = mean_squared_error(probability, y, divisor)
        every = self.trainer.log_every_n_steps
        if self._monitored or (every and (self.global_step + 1) % every == 0):
            self.check_finite()
            if not whole:
                accuracy = ((probability >= THRESHOLD) == y.bool()).sum() / divisor
            self.log_dict({"train/loss": loss, "train/accuracy": accuracy}, sync_dist=not whole)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log loss, accuracy and AUROC of held-out images; return their probabilities, as `forward` does."""
        return self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log loss, accuracy and AUROC of the test images; return their probabilities, as `forward` does."""
        return self._evaluate(batch, "test", self.test_metrics)

    def _evaluate(self, batch: Any, stage: str, metrics: Any) -> Tensor:
        x, y = batch
        probability = self(x)
        if len(y):  # a share may be empty
            metrics["loss"].update(probability, y)
            metrics["accuracy"].update(((probability >= THRESHOLD) == y.bool()).float())
            metrics["auroc"].update(probability, y)  # not as integers: torchmetrics assumes floats for an empty share
        self.log_dict({f"{stage}/{name}": metric for name, metric in metrics.items()}, batch_size=len(y))
        return probability

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Probability and digit of each image.

        Args:
            batch: Pixels, or a sequence that begins with them; see `forward`.
            batch_idx: Unused.

        Returns:
            "probability" of the first digit, ``(N, 1)``, and the "digit", ``(N, 1)`` int64: the second digit where the
            probability is below 0.5, otherwise the first. With several processes each returns the results for the
            whole of a `lit_threeseven.batches.Batch`, in order, not only for its share.
        """
        probability = self(batch if isinstance(batch, Tensor) else batch[0])
        if isinstance(batch, Batch) and batch.world_size > 1 and distributed.is_initialized():
            probability = torch.cat(gather_all_tensors(probability))
        first, second = self.digits
        return {"probability": probability, "digit": torch.where(probability < THRESHOLD, second, first)}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, as usual."""
        if name == "_current_fx_name":
            # Lightning notes the running hook here some fifty times a step, and has no public way to switch that off;
            # through nn.Module's own `__setattr__` it takes 4% of an epoch.
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Update, as usual; in `exact.Unfused`, once the gradient is there, if the bits must be the same everywhere."""
        with ExitStack() as stack:

            def closure() -> Any:
                loss = optimizer_closure()
                stack.enter_context(exact.Unfused())
                return loss

            super().optimizer_step(epoch, batch_idx, optimizer, closure if self.is_exact else optimizer_closure)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        """Clip, as usual; by `exact.clip_norm` where the bits must be the same everywhere."""
        if self.is_exact and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            exact.clip_norm([p for p in self.parameters() if p.grad is not None], gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """Plain gradient descent: ``W -= lr * gradient``."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def setup(self, stage: str) -> None:
        """Refuse data of other digits: their labels would mean something else.

        Raises:
            ValueError: If the data module's `digits` are not these.
        """
        digits = getattr(self.trainer.datamodule, "digits", self.digits)
        if tuple(digits) != tuple(self.digits):
            raise ValueError(f"The data has digits={digits}, and the network digits={self.digits}; make them the same.")
        plain = vars(type(self)).get("takes_sparse_pixels") and all(
            getattr(type(self), name) is getattr(LitThreeSeven, name) for name in ("forward", "training_step")
        )
        float64 = self.trainer.precision == "32-true" and self.trainer.strategy.root_device.type != "mps"
        self.is_exact = bool(torch.are_deterministic_algorithms_enabled() and plain and float64)
        if self.is_exact:
            for metrics in (self.val_metrics, self.test_metrics):
                metrics.update(exact.metrics())

    def on_train_start(self) -> None:
        """Log at every step if a callback or scheduler watches a training metric."""
        watchers = [*self.trainer.callbacks, *self.trainer.lr_scheduler_configs]
        self._monitored = any(str(getattr(watcher, "monitor", "")).startswith("train/") for watcher in watchers)
        if torch.are_deterministic_algorithms_enabled():
            exact.prepare(self)


def _metrics() -> nn.ModuleDict:
    # torchmetrics averages over all rows, even when processes have different numbers of them
    return nn.ModuleDict(
        {"loss": MeanSquaredError(), "accuracy": MeanMetric("disable"), "auroc": BinaryAUROC(validate_args=False)}
    )
