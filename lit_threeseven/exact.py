"""The same bits, whatever computes them: the step of a ``Trainer(deterministic=True)``.

A floating-point sum depends on its order, and so on devices, threads and vector widths, because each addition rounds.
Here the terms are rounded *before* they are added, to a grid so coarse that no sum needs rounding: an exact sum has no
order. Everything else acts on single numbers, by operations whose results IEEE 754 defines to the last bit.

float64 holds every multiple of g up to 2^53 g. If a power of two L is above the sum of all terms' absolute values,
multiples of g = L / 2^53 add up exactly in any order; a byte times such a multiple is another one. Adding 0.75 L to a
number of at most L / 4 and taking it away again rounds it to a multiple of g. The sums, and the L of each:

- a prediction, of 784 products of a byte and a weight: 2^18 times the power of two above max |W|;
- a gradient, of the rows' products of a byte and a slope, (p - y) p (1 - p), half the derivative of a squared error by
  x W + b and at most 4/27: the power of two above 38 times the rows, as 255 · 4/27 < 38;
- a loss, of squared errors, at most 1: the power of two above 4 times the rows.

With 12,396 images a grid resolves 2^-31 of the largest term; float32 has 24 bits. Three more things would differ:
libraries' exponentials (`exponential` only adds and multiplies), updates, as some processors don't round a product that
they add (`Unfused` does, for optimizers in `ELEMENTWISE`), and DDP's average, which divides (one all-reduce adds up).
"""

from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torchmetrics import MeanSquaredError
from torchmetrics.classification import BinaryAUROC
from torchmetrics.utilities import dim_zero_cat

from lit_threeseven.batches import Batches
from lit_threeseven.pixels import WholePixels, multiply

ELEMENTWISE = {"SGD", "ASGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop"}


def rounded(x: Tensor, limit: Tensor | float) -> Tensor:
    """Float64 numbers on the grid of sums below `limit`, a power of two, at least four times each of them."""
    return (x + 0.75 * limit).sub_(0.75 * limit)


def power_above(x: Tensor) -> Tensor:
    """The smallest power of two above a float64 scalar of at least 2^-501; 0 for 0."""
    return x / torch.frexp(x.clamp(min=2**-501)).mantissa


def exponential(x: Tensor) -> Tensor:
    """``exp(x)`` of float64 numbers from -87 to 87, with a relative error below 2^-30, and 2^-40 from -20 to 20."""
    t, power = x * 2**-12, torch.zeros_like(x)
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1):
        power.mul_(t).add_(coefficient)
    for _ in range(12):
        power.mul_(power)
    return power


def probability(x: WholePixels, W: Tensor, b: Tensor) -> Tensor:
    """``sigmoid(x W + b)`` in float64, ``(N, 1)``, from 1e-38 to 1; without a gradient."""
    W, b = W.detach().double(), b.detach().double()
    minus_z = multiply(x.by_rows, rounded(W, 2**18 * power_above(W.abs().max()))) * (-1 / 255) - b
    return exponential(minus_z.clamp_(-87, 87)).add_(1).reciprocal_()


class Step(torch.autograd.Function):
    """Loss and accuracy of a global batch, and the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, b: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Float64 scalars; the batch has `WholePixels`."""
        p = probability(batch.x, W, b)
        error, rows = p - batch.y, batch.global_rows
        slope = rounded(error * p * (1 - p), 2.0 ** (38 * rows).bit_length())
        squared = rounded(error * error, 2.0 ** (4 * rows).bit_length())
        right = ((error >= -0.5) & (error < 0.5)).double()
        sums = torch.cat([multiply(batch.x.by_columns, slope).squeeze(1), slope.sum(0), squared.sum(0), right.sum(0)])
        if batch.world_size > 1:
            distributed.all_reduce(sums)
        ctx.means = sums.mul_(1 / rows)
        loss, accuracy = sums[-2], sums[-1]
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> Any:
        """The exact means over all rows, rounded to float32."""
        gradients = ctx.means * (2 * factor)
        return (gradients[:-3, None] * (1 / 255)).float(), gradients[-3:-2].float(), None


class Unfused(torch.overrides.TorchFunctionMode):
    """In this context a product is rounded before it is added to something, and a number divides as a tensor does."""

    ADDED: ClassVar[dict[str, Any]] = {
        "add": lambda x, y, alpha=1: y * alpha,
        "addcmul": lambda x, y, z, value=1: y * z * value,
        "addcdiv": lambda x, y, z, value=1: y / z * value,
        "lerp": lambda x, y, weight: (y - x) * weight,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name.rstrip("_") in self.ADDED:
            args, kwargs = (args[0], self.ADDED[name.rstrip("_")](*args, **kwargs)), {}
            func = torch.Tensor.add_ if name[-1] == "_" else torch.Tensor.add
        elif name == "div" and not isinstance(args[1], Tensor):
            args = args[0], torch.full_like(*args)
        return func(*args, **kwargs)


def clip_norm(parameters: list[Any], most: float) -> None:
    """Scale gradients down where their common Euclidean norm is above `most`."""
    squares = torch.cat([parameter.grad.flatten() for parameter in parameters]).double() ** 2
    norm = rounded(squares, 2.0 ** (4 * len(squares)).bit_length() * power_above(squares.max())).sum().sqrt()
    nn.utils.clip_grads_with_norm_(parameters, most, norm)


class _MeanSquaredError(MeanSquaredError):
    def update(self, preds: Tensor, target: Tensor) -> None:
        self.sum_squared_error += rounded((preds.double() - target) ** 2, 2**20).sum()  # of less than 2^20 rows
        self.total += len(target)


class _AUROC(BinaryAUROC):
    def compute(self) -> Tensor:  # the share of pairs of a first and a second digit that are in order; a tie is half
        p, y = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        first, second = p[y == 1].sort().values, p[y == 0]
        twice_wrong = torch.searchsorted(first, second) + torch.searchsorted(first, second, right=True)
        return (2 * len(first) - twice_wrong).sum().double() * (0.5 / max(1, len(first) * len(second)))


def metrics() -> dict[str, nn.Module]:
    """Loss and AUROC that don't depend on the order of rows."""
    return {"loss": _MeanSquaredError().set_dtype(torch.float64), "auroc": _AUROC(validate_args=False)}


def prepare(module: Any) -> None:
    """Switch averaging and fused updates off before a fit; say so if the bits may still differ."""
    trainer, loader = module.trainer, module.trainer.train_dataloader
    exact = isinstance(loader, Batches) and isinstance(loader.dataset[0].x, WholePixels)
    if exact and isinstance(trainer.strategy.model, nn.parallel.DistributedDataParallel):
        trainer.strategy.model.register_comm_hook(None, noop_hook)
    for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
        group.update(dict.fromkeys({"foreach", "fused"} & group.keys(), False))
    has = [type(part).__name__ for part in (module, trainer.datamodule, *trainer.optimizers)]
    if not (exact and not loader.dataset.change and ELEMENTWISE.issuperset(has[2:])):
        rank_zero_warn(
            "deterministic=True gives the same bits everywhere only for LitThreeSeven's step, ThreeSevenDataModule's "
            f"images as they are, 32-true, and Adam or the like; this run has {', '.join(has)} and {trainer.precision}."
        )
