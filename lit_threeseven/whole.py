"""Whole numbers, and why two devices give the same bits as one.

A floating-point sum depends on its order, and so on devices, threads and vector widths, because each addition rounds.
A pixel is a byte, a byte times a whole number is a whole number, and a sum of whole numbers has no order. So weights
and slopes are rounded to whole numbers of a fine grid before they are multiplied, and a sum is rounded once, last.
Everything else acts on single numbers, by operations that IEEE 754 defines to the last bit.

A number is written in words of 28 bits: a sum of 2^17 products of a byte and a word fits into float64's 53 bits.
"""

import math
import warnings
from contextlib import suppress
from functools import cache, reduce

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.weak import WeakTensorKeyDictionary

WORD = 28  # bits
SUM = 24  # bits that a packed sum may have: it is float32
ROWS = 512  # images converted to float64 at once on a CPU: as many as fit into its cache


@cache
@torch.inference_mode(False)
def powers(device: torch.device, dtype: torch.dtype, bits: int, digits: int, words: int = 1) -> Tensor:
    """Combines digits into words: ``(words, words * digits)``, in each row 1, ``2**bits``, … for its own digits."""
    return torch.tensor(np.kron(np.eye(words), np.ldexp(1.0, bits * np.arange(digits))), dtype=dtype, device=device)


def split(numbers: Tensor, bits: int, digits: int) -> Tensor:
    """Round to whole numbers, and write them as `digits` digits of `bits` bits, the lowest first.

    Args:
        numbers: ``(N, 1)`` floats, up to ``2**(bits * digits - 1)``. Only fractions are rounded.
        bits: Of a digit, which is from ``-2**(bits - 1)`` to ``2**(bits - 1)``.
        digits: How many.

    Returns:
        ``(digits, N)``, of the type of `numbers`.
    """
    parts = (numbers.t() * powers(numbers.device, numbers.dtype, -bits, digits + 1).t()).round_()
    return torch.sub(parts[:-1], parts[1:], alpha=2**bits)


class Product:
    """Bytes, ``(N, D)``, times whole numbers, in float64, which all devices but Apple's have."""

    def __init__(self, x: Tensor) -> None:
        self.rows = ROWS if x.device.type == "cpu" else 2**14
        self.parts = (x if len(x) > self.rows else x.double()).split(self.rows)

    def times(self, numbers: Tensor) -> Tensor:
        """``x`` times numbers, ``(D, 1)`` float32, each as one word; ``(N, 1)`` float64."""
        word = numbers.round().double()
        return torch.cat([part.double() @ word for part in self.parts])

    def transposed_times(self, numbers: Tensor) -> Tensor:
        """``x``, transposed and with a last row of ones, times numbers, ``(N, 1)`` float32, each as two words.

        Returns:
            ``(2, D + 1)`` float64.
        """
        words = split(numbers, WORD, 2).double()
        pairs = zip(words.split(self.rows, 1), self.parts, strict=True)
        sums = reduce(torch.add, (word @ part.double() for word, part in pairs))
        return torch.cat([sums, words.sum(1, keepdim=True)], 1)


class Matrix:
    """Bytes, ``(N, D)``, packed for FBGEMM's integer product.

    A byte, less 128, times a digit has 7 bits more than the digit. So a sum may have ``2**(SUM - 7 - bits)`` terms, and
    more columns than that are packed in parts.

    Args:
        x: The bytes.
        bits: Of a digit. Fewer allow more terms, more need fewer digits.
    """

    def __init__(self, x: Tensor, bits: int) -> None:
        self.bits, self.terms = bits, 2 ** (SUM - 7 - bits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about quantized tensors being removed
            parts = [part.contiguous() for part in (x ^ 128).view(torch.int8).split(self.terms, 1)]
            numbers = [torch._make_per_tensor_quantized_tensor(part, 1.0, -128) for part in parts]
            self.parts = [torch.ops.quantized.linear_prepack(part, None) for part in numbers]

    def times(self, numbers: Tensor, words: int) -> Tensor:
        """``x`` times numbers, ``(D, 1)`` float32, each as so many words; ``(words, N)`` float64."""
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        each = WORD // self.bits
        # only as many digits as the largest number has
        digits = min(max(math.frexp(numbers.abs().max().item())[1] // self.bits + 1, 1), words * each)
        pairs = zip(split(numbers, self.bits, digits).split(self.terms, 1), self.parts, strict=True)
        made = (multiply(part, 1.0, 2 ** (self.bits - 1), columns).double() for part, columns in pairs)
        together = powers(numbers.device, torch.float64, self.bits, each, words)[:, :digits]
        sums: Tensor = together @ reduce(torch.add, made)
        return sums


class Packed:
    """As `Product`, by integer products: for bytes that are multiplied many times."""

    def __init__(self, x: Tensor) -> None:
        self.ink = x.any(0).nonzero().squeeze(1)  # pixels that are not 0 in all images
        self.columns, self.places = x.shape[1], torch.cat([self.ink, torch.tensor([x.shape[1]])])
        x = x.index_select(1, self.ink)
        self.x, self.transposed = Matrix(x, 7), Matrix(torch.cat([x.t(), x.new_ones(1, len(x))]), 4)

    def times(self, numbers: Tensor) -> Tensor:
        """As `Product.times`."""
        return self.x.times(numbers.index_select(0, self.ink), 1).t()

    def transposed_times(self, numbers: Tensor) -> Tensor:
        """As `Product.transposed_times`."""
        sums = self.transposed.times(numbers, 2)
        return sums.new_zeros(2, self.columns + 1).index_copy_(1, self.places, sums)


KEPT = WeakTensorKeyDictionary()  # bytes to `Packed`


def keep(x: Tensor) -> None:
    """Pack bytes, ``(N, D)``, that are multiplied at each step and never change, if that works here and is exact.

    torch's functions for it are not public, and may be missing or fail.
    """
    if x.device.type != "cpu" or not 0 < len(x) <= 2**17:
        return
    with suppress(AttributeError, RuntimeError):
        numbers = [torch.linspace(-(2**27), 2**27, size).unsqueeze(1) for size in reversed(x.shape)]
        ways = Packed(x), Product(x)
        made = [(way.times(numbers[0]), way.transposed_times(numbers[1] * 2**28)) for way in ways]
        if all(map(torch.equal, *made)):
            KEPT[x] = ways[0]


def product(x: Tensor) -> Product | Packed:
    """A `Packed` of bytes, ``(N, D)``, if they were kept, otherwise a `Product`; the bits are the same."""
    return KEPT.get(x) or Product(x)


def over_processes(sums: Tensor) -> Tensor:
    """Add up the whole numbers of all processes, in place."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sums)
    return sums
