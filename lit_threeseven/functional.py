"""The mathematics of the network: starting weights, a sigmoid, a loss."""

import math

import numpy as np
import torch
from torch import Tensor


def check_positive(**numbers: float) -> None:
    """Raise a ValueError for a number that is not finite and above 0 in float32; it names it and its value."""
    for name, value in numbers.items():
        if not 0 < torch.tensor(value, dtype=torch.float32) < float("inf"):
            raise ValueError(f"{name} must be a finite float32 above 0, got {value}.")


def normal(random: np.random.Generator, shape: tuple[int, ...], std: float) -> Tensor:
    """Normally distributed numbers around 0, which don't depend on the processor, as `torch.randn`'s do."""
    return torch.tensor(random.standard_normal(shape) * std, dtype=torch.get_default_dtype())


def sigmoid(x: Tensor) -> Tensor:
    """Squash any real number into a probability: ``1 / (1 + exp(-x))``.

    Where ``exp(-x)`` would overflow (``x`` below about -88 in float32) the equation's own gradient is
    ``inf / inf``. There the input is clamped to the edge of the range, so that values and gradients are finite
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


def mean_squared_error(prediction: Tensor, target: Tensor, divisor: float | None = None) -> Tensor:
    """Average of the squared differences: ``sum((prediction - target)²) / divisor``.

    Args:
        prediction: ``(N, 1)``, probabilities in [0, 1].
        target: ``(N, 1)``, labels, 0 or 1.
        divisor: What the sum is divided by; None means N. A process that holds a share of a batch passes
            `Batch.divisor`, so that the average over processes is the mean over the whole batch.

    Returns:
        Scalar tensor.

    Raises:
        ValueError: If the shapes differ. Broadcasting ``(N, 1)`` against ``(N,)`` would average N × N differences.

    Example:
        >>> mean_squared_error(torch.tensor([[0.3]]), torch.tensor([[1.0]]))
        tensor(0.4900)
    """
    if prediction.shape != target.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"prediction and target must have the same shape, got {shapes}.")
    return ((prediction - target) ** 2).sum() / (len(target) if divisor is None else divisor)
