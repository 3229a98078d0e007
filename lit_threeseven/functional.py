"""The mathematics of the network: a sigmoid, a loss, and nothing that knows where the numbers come from."""

import math
from typing import Any

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """Squash any real number into a probability: ``1 / (1 + exp(-x))``.

    Where ``exp(-x)`` would leave the range of the type (below about -88 in float32) the equation's own gradient
    is ``inf / inf``. There the input is held at the edge of the range, so that values and gradients are finite
    for every finite input; in float32 the value is off by less than 1e-37.

    Args:
        x: Floating-point tensor of any shape.

    Returns:
        Values in [0, 1], same shape and type as ``x``.

    Example:
        >>> sigmoid(torch.tensor([-2.0, 0.0, 1000.0]))
        tensor([0.1192, 0.5000, 1.0000])
    """
    limit = math.log(torch.finfo(x.dtype).max) - 1
    return 1 / (1 + torch.exp(-x.clamp(min=-limit)))


def mean_squared_error(prediction: Tensor, target: Tensor, rows: float | None = None) -> Tensor:
    """Average of the squared differences: ``sum((prediction - target)²) / rows``.

    Args:
        prediction: ``(N, 1)``, probabilities in [0, 1].
        target: ``(N, 1)``, labels, 0 or 1.
        rows: What the sum is divided by. None means N. A process that holds only a share of a batch passes the rows
            of the whole batch divided by the number of processes: the average over the processes is then the mean
            over the whole batch, also where shares differ in size or are empty.

    Returns:
        Scalar tensor.

    Raises:
        ValueError: If the shapes differ. Broadcasting ``(N, 1)`` against ``(N,)`` would average N × N differences.

    Example:
        >>> mean_squared_error(torch.tensor([[0.3]]), torch.tensor([[1.0]]))
        tensor(0.4900)
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have the same shape, got {tuple(prediction.shape)} and {tuple(target.shape)}."
        )
    return ((prediction - target) ** 2).sum() / (len(target) if rows is None else rows)


def gradient(x: Any, probability: Tensor, target: Tensor, rows: float | None = None) -> tuple[Tensor, Tensor]:
    """Gradient of ``mean_squared_error(sigmoid(x W + b), target, rows)`` by `W` and `b`, written out.

    With the slope ``s = 2 (p - y) p (1 - p) / rows`` of the loss by ``x W + b`` it is ``xᵀ s`` and the sum of ``s``.

    Args:
        x: ``(N, 784)``, anything with a transpose ``x.T`` that multiplies a column.
        probability: ``p = sigmoid(x W + b)``, ``(N, 1)``.
        target: ``y``, ``(N, 1)``.
        rows: As for `mean_squared_error`.

    Returns:
        The gradients by `W`, ``(784, 1)``, and by `b`, ``(1,)``.
    """
    factor = 2 / (len(target) if rows is None else rows)
    slope = (probability - target) * probability * (1 - probability) * factor
    return x.T @ slope, slope.sum(0)
