"""The mathematics of the network, with the same bits on any device; `whole` explains how."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_threeseven import whole
from lit_threeseven.errors import UserError
from lit_threeseven.whole import over_processes

THRESHOLD = 0.5  # below this probability the answer is the second digit, otherwise the first
WEIGHT, SLOPE = 2.0**-26, 2.0**-42  # units of a weight and of a slope, see `linear`
STEPS = 2048  # places from 0 to 1 in the table of the sigmoid
ROUND = 1.5 * 2.0**20  # adding it to a float64 from -1 to 1, and subtracting it again, rounds to 2^-32


def normal(random: np.random.Generator, shape: tuple[int, ...], std: float) -> Tensor:
    """Normally distributed numbers around 0; unlike those of `torch.randn`, they don't depend on the processor."""
    return torch.tensor(random.standard_normal(shape) * std, dtype=torch.get_default_dtype())


def scale(pixels: Tensor) -> Tensor:
    """Convert bytes, 0 to 255, of any shape to float32 in [0, 1]; floats are returned unchanged."""
    return pixels / 255 if pixels.dtype == torch.uint8 else pixels


def linear(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """``x W + b``; for bytes, the same bits on any device.

    Bytes are multiplied by whole numbers: weights in units of 2^-26, and slopes, the derivatives of the loss by
    ``x W + b``, in units of 2^-42. No sum loses a bit as long as the absolute values of the weights add up to at most
    2^17, and those of the slopes of all rows to 2; those of a mean of squared errors add up to at most 8/27. Larger
    sums are as exact as float64's, up to numbers of 2^120 units.

    With several processes (`torch.distributed`), the gradient for bytes is the sum over all of them. So the loss of
    each process must be the sum over its share, divided by the rows of the global batch.

    Args:
        x: ``(N, D)`` or ``(N, …)`` with D numbers each: uint8, 0 to 255, or floating-point, in [0, 1].
        W: ``(D, K)``. If K is not 1, `W` not float32, or the device MPS, which has no float64, bytes are scaled to
            floats first, and rounded as floats are.
        b: ``(K,)``.

    Returns:
        ``(N, K)``, of the type of `W`; bytes count as ``x / 255``.

    Example:
        >>> linear(torch.tensor([[0, 255]], dtype=torch.uint8), torch.tensor([[5.0], [2.0]]), torch.tensor([0.5]))
        tensor([[2.5000]])
    """
    x = x.flatten(1)
    if x.dtype == torch.uint8 and W.dtype == torch.float32 and W.shape[1] == 1 and x.device.type != "mps":
        return cast(Tensor, _Linear.apply(x, W, b))
    return scale(x).to(W.dtype) @ W + b


class _Linear(torch.autograd.Function):
    """`linear` of bytes, ``(N, D)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        times, ctx.transposed_times = whole.products(x)
        sums = times((W / WEIGHT).round_())
        return (sums * (WEIGHT / 255)).float() + b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[None, Tensor, Tensor]:
        numbers = (slopes / SLOPE).round_()
        sums = ctx.transposed_times(numbers)
        bias = 255 * numbers.sum(0, keepdim=True, dtype=torch.float64)  # as of a pixel that is always 255
        gradients = (over_processes(torch.cat([sums, bias])) * (SLOPE / 255)).float()
        return None, gradients[:-1], gradients[-1]


def sigmoid(x: Tensor) -> Tensor:
    """Squash any real number into a probability: ``1 / (1 + exp(-x))``; its derivative is ``p (1 - p)``.

    Both are finite for every finite input. For float32, a table gives the value at the nearest multiple of 2^-11, and a
    Taylor polynomial of second order the rest. Its additions and multiplications round alike everywhere, as a library's
    exponential may not. The relative error is less than 2^-22; below -87 and above 20 the value is constant.

    Args:
        x: Floating-point tensor of any shape.

    Returns:
        Values in [0, 1], same shape and type as ``x``.

    Example:
        >>> sigmoid(torch.tensor([-2.0, 0.0, 1000.0]))
        tensor([0.1192, 0.5000, 1.0000])
    """
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if x.dtype != torch.float32 or tracing or torch.compiler.is_compiling():
        return torch.sigmoid(x)  # exported programs use their own sigmoid
    x = torch.nn.functional.hardtanh(x, -87, 20)
    with torch.no_grad():
        place = (x * STEPS).round_().nan_to_num_()
        p = _table(x.device).index_select(0, (place + 87 * STEPS).int().flatten()).view_as(x)
        slope, curvature = (1 - p).mul_(p), 0.5 - p
    rest = torch.sub(x, place, alpha=1 / STEPS)
    return p + slope * rest * (1 + curvature * rest)


@cache
@torch.inference_mode(False)
def _table(device: torch.device) -> Tensor:
    """The sigmoid from -87 to 20, in steps of 1 / `STEPS`."""
    factors = np.full(107 * STEPS + 1, 1.0004884004786945)  # exp(1 / STEPS)
    factors[0] = 1.6458114310822737e-38  # exp(-87)
    exponential = np.multiply.accumulate(factors)  # relative errors up to 2^-34 would not change any float32
    return torch.tensor(exponential / (1 + exponential), dtype=torch.float32, device=device)


def layers(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The logits of one or more layers with sigmoids between them: ``sigmoid(x W1 + b1) W2 + b2``, and so on.

    Args:
        x: As for `linear`.
        parameters: `W1`, `b1`, `W2`, `b2`, …

    Returns:
        ``(N, K)``, where the last layer has K columns.
    """
    z = linear(x, *parameters[:2])
    for W, b in zip(parameters[2::2], parameters[3::2], strict=True):
        z = linear(sigmoid(z), W, b)
    return z


def mean_squared_error(prediction: Tensor, target: Tensor, divisor: float | None = None) -> Tensor:
    """Average of the squared differences: ``sum((prediction - target)²) / divisor``.

    For float32, each square is rounded to 2^-32, so that up to 2^21 of them add up to the same bits in any order.

    Args:
        prediction: ``(N, 1)``, probabilities in [0, 1].
        target: ``(N, 1)``, labels, 0 or 1.
        divisor: What the sum is divided by; None means N. For a share of a batch, use `Batch.divisor`.

    Returns:
        Scalar tensor.

    Raises:
        UserError: If the shapes differ. Broadcasting ``(N, 1)`` against ``(N,)`` would average N × N differences.

    Example:
        >>> mean_squared_error(torch.tensor([[0.3]]), torch.tensor([[1.0]]))
        tensor(0.4900)
    """
    if prediction.shape != target.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise UserError(f"prediction and target must have the same shape, got {shapes}.")
    mean = sum_of_squares(prediction, target) / (len(target) if divisor is None else divisor)
    return mean.to(prediction.dtype)


def sum_of_squares(prediction: Tensor, target: Tensor) -> Tensor:
    """``sum((prediction - target)²)``, a scalar: float64 for float32, and exact, see `mean_squared_error`."""
    difference = prediction - target
    squares = difference * difference
    if squares.dtype != torch.float32 or squares.device.type == "mps":
        return squares.sum()
    return squares.double().add_(ROUND).sub_(ROUND).sum()


class GradientDescent(torch.optim.Optimizer):
    """``W -= lr * gradient``: a product and a difference, rounded alike on every processor.

    Args:
        params: As in torch's optimizers.
        lr: Learning rate, 0 or above.

    Raises:
        UserError: If the rate is below 0, or not finite.
    """

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        if not 0 <= lr < math.inf:
            raise UserError(f"lr must be a finite number of at least 0, got {lr}.")
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; returns what `closure`, which computes it, returns."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad
        return loss
