"""`LitThreeSevenMany`: many networks of one layer, trained at once by one matrix product."""

import math
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn
from torch.backends.mkldnn import is_available
from torchmetrics import MeanSquaredError

from lit_threeseven.batches import Batch, shared
from lit_threeseven.dataset import check_digits
from lit_threeseven.errors import UserError
from lit_threeseven.functional import THRESHOLD, linear
from lit_threeseven.module import PIXELS, LitThreeSeven
from lit_threeseven.resumable import Resumable

POINTS = 100  # steps, at most, whose losses are kept
SEEN: WeakKeyDictionary[Batch, tuple[Tensor, Tensor] | None] = WeakKeyDictionary()  # and what `again` returned


class LitThreeSevenMany(Resumable):
    """K independent `LitThreeSeven`s as the columns of one `W`, ``(784, K)``, and one `b`, ``(K,)``.

    Column k begins as ``LitThreeSeven(lr, init_std)`` does after ``torch.manual_seed(seed)``, and ends where it would,
    but for rounding: its gradient times its rate is one column of the step that all take together. If a column becomes
    non-finite, the others don't notice.

    Args:
        models: Learning rate, `init_std` and seed of each network; all different.
        digits: The two digits to tell apart.
        rows: Images per training step, to estimate the memory it needs; 0 skips the estimate.

    Attributes:
        curve: After a fit, at most 100 pairs: a number of steps, and the training losses after them, ``(K,)``.
        results: After a validation "loss" and "accuracy" of each network, ``(K,)``.

    Raises:
        UserError: If there is no network, one is there twice or has an argument out of range, or a step would not fit
            into the memory.
    """

    rates: Tensor

    def __init__(self, models: list[tuple[float, float, int]], digits: tuple[int, int] = (3, 7), rows: int = 0) -> None:
        super().__init__()
        if not models or len(set(models)) < len(models):
            raise UserError(
                f"Give at least one network, and none twice; got {len(models)}, {len(set(models))} different."
            )
        check_memory(len(models), rows)
        self.save_hyperparameters(ignore="rows", logger=False)
        self.models, self.digits, self.lr = models, check_digits(digits), 1.0
        columns = []
        for lr, init_std, seed in models:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                alone = LitThreeSeven(lr, init_std, digits)
            columns.append(torch.cat([alone.W.detach().flatten(), alone.b.detach()]))
        numbers = torch.stack(columns, dim=1)
        self.W, self.b = nn.Parameter(numbers[:PIXELS].clone()), nn.Parameter(numbers[PIXELS].clone())
        self.register_buffer("rates", torch.tensor([lr for lr, *_ in models]), persistent=False)
        self.loss, self.error = (MeanSquaredError(num_outputs=len(models)) for _ in range(2))
        self.curve: list[tuple[int, Tensor]] = []
        self.results: dict[str, Tensor] = {}
        self._kept: set[int] = set()  # steps

    def forward(self, x: Tensor) -> Tensor:
        """Probability of the first digit for each image and network, ``(N, K)``; see `LitThreeSeven.forward`."""
        return torch.sigmoid(linear(x, self.W, self.b))  # takes half the time of our own for so many numbers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of all losses; each has its own column of `W`, and so the gradients are each network's own."""
        x, y, divisor = shared(batch)
        packed = again(batch) if self.W.dtype == torch.float32 else None
        if packed:
            ink, pixels = packed
            product: Any = nn.functional.linear(pixels, self.W.index_select(0, ink).t(), self.b)
            probability = torch.sigmoid(product.to_dense())
        else:
            probability = self(x)
        y = y.expand_as(probability)
        if self.global_step in self._kept:
            self.curve.append((self.global_step, ((probability.detach() - y) ** 2).sum(0) / divisor))
        return nn.functional.mse_loss(probability, y, reduction="sum") / divisor

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Give each network its own rate."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.rates)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure each network; the mean squared error of answers, 0 or 1, is the fraction of wrong ones."""
        x, y = batch
        if len(y):
            probability = self(x)
            self.loss.update(probability, y.expand_as(probability))
            self.error.update((probability >= THRESHOLD).float(), y.expand_as(probability))

    def configure_optimizers(self) -> Any:
        """One step of plain gradient descent for all; `lr` multiplies every network's own rate."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def on_train_start(self) -> None:
        """Choose the steps whose losses are kept, evenly on a logarithmic scale."""
        steps = self.trainer.estimated_stepping_batches
        last = 10_000 if steps == float("inf") else int(steps) - 1
        self.curve = []
        self._kept = {round(math.expm1(math.log1p(last) * i / (POINTS - 1))) for i in range(POINTS)}

    def on_train_end(self) -> None:
        """Average the kept losses over processes."""
        if self.curve:
            steps, losses = zip(*self.curve, strict=True)
            mean = self.trainer.strategy.reduce(torch.stack(losses), reduce_op="mean").cpu()
            self.curve = list(zip(steps, mean, strict=True))

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics of all rows, of all processes."""
        loss, error = (metric.compute().reshape(-1).cpu() for metric in (self.loss, self.error))
        self.results = {"loss": loss, "accuracy": 1 - error}
        self.loss.reset()
        self.error.reset()

    def check_finite(self) -> None:
        """Allow a network to diverge: it doesn't affect the others, and `diverged` says which did."""

    def single(self, k: int) -> LitThreeSeven:
        """Network k as a `LitThreeSeven` of its own, on the CPU."""
        lr, init_std, _ = self.models[k]
        model = LitThreeSeven(lr, init_std, self.digits)
        with torch.no_grad():
            model.W.copy_(self.W[:, k : k + 1])
            model.b.copy_(self.b[k : k + 1])
        return model

    def diverged(self, before: Tensor, after: Tensor) -> Tensor:
        """Which networks are no longer finite, or have a higher loss after training than before; all are ``(K,)``."""
        finite = self.W.detach().isfinite().all(0).cpu() & self.b.detach().isfinite().cpu()
        return ~(finite & (after <= before))


def again(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Which pixels have ink, and these in oneDNN's own layout, if a CPU trains on the same batch again: a full one.

    oneDNN's narrow products take half the time of those of ordinary tensors, but know neither mixed precision nor
    compilation.
    """
    if not isinstance(batch, Batch) or batch.x.device.type != "cpu" or batch.x.dtype != torch.float32:
        return None
    if not len(batch.x) or not is_available() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    if batch in SEEN and SEEN[batch] is None:
        has_ink = batch.x.any(0)
        has_ink[0] = True  # at least one pixel
        ink = has_ink.nonzero().squeeze(1)
        SEEN[batch] = ink, batch.x.index_select(1, ink).to_mkldnn()
    return SEEN.setdefault(batch, None)


def check_memory(networks: int, rows: int) -> None:
    """Raise a UserError if training that many networks at once on batches of `rows` images would not fit."""
    each, free = 4 * (6 * rows + 3 * PIXELS), psutil.virtual_memory().available  # bytes; six numbers per image
    if each * networks > free:
        raise UserError(
            f"{networks:,} networks at once take {each * networks / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free: "
            f"{free // each:,} would fit."
        )
