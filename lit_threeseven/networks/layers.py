"""`LitThreeSevenMLP`: the same mathematics in several layers."""

from itertools import pairwise

import numpy as np
import psutil
from torch import Tensor, nn

from lit_threeseven.dataset import check_digits
from lit_threeseven.errors import UserError, check_positive
from lit_threeseven.functional import layers, normal
from lit_threeseven.module import PIXELS, LitThreeSeven
from lit_threeseven.resumable import plain


class LitThreeSevenMLP(LitThreeSeven):
    """A multilayer perceptron: ``h1 = sigmoid(x W1 + b1)``, ``h2 = sigmoid(h1 W2 + b2)``, …, up to the probability.

    The parameters are `W1`, ``(784, hidden_sizes[0])``, `b1`, ``(hidden_sizes[0],)``, and so on; the last ones have one
    column. Everything else is as in `LitThreeSeven`, except that only the same machine and devices give the same bits.

    Args:
        hidden_sizes: Number of units in each hidden layer, from the first to the last.
        lr: Learning rate of plain gradient descent, above 0. At 1, the first steps on full batches push the output of
            a network as wide as the default one to where its sigmoid is flat, and it stays there.
        gain: Standard deviation of a layer's starting weights, times the square root of its number of inputs, above 0.
            A sigmoid's slope is at most 1/4; at about 4 neither the differences between images nor the gradients
            shrink from layer to layer, however many there are (after Glorot and Bengio 2010).
        digits: The two digits to tell apart; `forward` gives the probability of the first.

    Raises:
        UserError: If an argument is out of range, or training would not fit into memory.

    Example:
        >>> model = LitThreeSevenMLP(hidden_sizes=[20, 10])
        >>> [tuple(parameter.shape) for parameter in model.parameters()]
        [(784, 20), (20,), (20, 10), (10,), (10, 1), (1,)]
    """

    def __init__(
        self,
        hidden_sizes: list[int] | tuple[int, ...] = (500, 150),
        lr: float = 0.1,
        gain: float = 4.0,
        digits: tuple[int, int] = (3, 7),
    ) -> None:
        check_positive(gain=gain)
        digits = check_digits(digits)
        sizes = plain(list(hidden_sizes))
        if not sizes or any(type(size) is not int or size < 1 for size in sizes):
            raise UserError(f"hidden_sizes must be whole numbers above 0, such as [500, 150], got {sizes}.")
        numbers = sum((inputs + 1) * outputs for inputs, outputs in pairwise([PIXELS, *sizes, 1]))
        needed, free = 16 * numbers, psutil.virtual_memory().available  # a weight, its gradient, two numbers of Adam's
        if needed > free:
            raise UserError(
                f"hidden_sizes={sizes} needs {needed / 1e9:,.1f} GB to train, and {free / 1e9:,.1f} GB are free."
            )
        super().__init__(lr, gain, digits)

    def add_weights(self, random: np.random.Generator) -> None:
        """Add `W1`, `b1`, …; each `b` puts the middle of its inputs, 0.5 from a sigmoid, where the slope is highest."""
        sizes = [PIXELS, *self.hparams["hidden_sizes"], 1]
        for i, (inputs, outputs) in enumerate(pairwise(sizes), 1):
            W = normal(random, (inputs, outputs), self.hparams["gain"] / inputs**0.5)
            self.register_parameter(f"W{i}", nn.Parameter(W))
            self.register_parameter(f"b{i}", nn.Parameter(-0.5 * (i > 1) * W.sum(0)))

    def logits(self, x: Tensor) -> Tensor:
        """The input of the last sigmoid, ``(N, 1)``; see `LitThreeSeven.forward`."""
        return layers(x, [*self.parameters()])
