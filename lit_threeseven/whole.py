"""Whole numbers, and why two devices give the same bits as one.

A floating-point sum depends on its order, and so on devices, threads and vector widths, because each addition rounds.
A pixel is a byte, a byte times a whole number is a whole number, and a sum of whole numbers has no order. So weights
and slopes are rounded to whole numbers before they are multiplied, and a sum is rounded once, last. Everything else
acts on single numbers, by operations that IEEE 754 defines to the last bit.

float64 holds all whole numbers up to 2^53. So any sum of bytes times numbers is exact, if the absolute values of these
numbers add up to at most 2^43. Digits, times their powers, add up to less than four times as much, which still fits.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from typing import cast

import torch
from torch import Tensor, distributed
from torch.utils.weak import WeakTensorKeyDictionary

ROWS = 512  # images converted to float64 at once on a CPU: as many as fit into its cache
SUM = 24  # bits of a packed sum, which is float32
Products = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
KEPT = WeakTensorKeyDictionary()  # bytes to `Products`


def products(x: Tensor) -> Products:
    """Two functions that multiply bytes, ``(N, D)``, and their transpose by whole numbers.

    They take ``(D, 1)`` and ``(N, 1)`` float32, and return ``(N, 1)`` and ``(D, 1)`` float64; see also `keep`.
    """
    if x in KEPT:
        return cast(Products, KEPT[x])
    count = len(x) // (ROWS if x.device.type == "cpu" else 2**14) + 1
    parts = (x.double() if count == 1 else x).chunk(count)

    def times(numbers: Tensor) -> Tensor:
        return torch.cat([part.double() @ numbers.double() for part in parts])

    def transposed_times(numbers: Tensor) -> Tensor:
        pairs = zip(parts, numbers.double().chunk(count), strict=True)
        return reduce(torch.add, (part.double().t() @ numbers for part, numbers in pairs))

    return times, transposed_times


def keep(x: Tensor) -> None:
    """Speed up the products of bytes, ``(N, D)``, that never change, if that works here and gives the same bits.

    torch's functions for it are not public, and may be missing or fail. One number in 16 of each product is compared.
    """
    if x.device.type != "cpu":
        return
    with suppress(AttributeError, RuntimeError):
        fast: Products = packed(x, 7), packed(x.t(), 4)
        exact = products(x[::16])[0], products(x[:, ::16])[1]
        trials = (torch.linspace(-(2**26), 2**26, size).round().unsqueeze(1) for size in reversed(x.shape))
        if all(torch.equal(way(n)[::16], other(n)) for way, other, n in zip(fast, exact, trials, strict=True)):
            KEPT[x] = fast


def packed(x: Tensor, bits: int) -> Callable[[Tensor], Tensor]:
    """The first of `products`, by FBGEMM's integer product of packed bytes and digits of so many bits.

    A byte times a digit is below ``2**(7 + bits)``. So a sum may have ``2**(SUM - 7 - bits)`` terms, and more columns
    than that are packed in parts. Two products with digits of 7 bits fit into 16, where FBGEMM may add them.
    """
    terms, multiply = 2 ** (SUM - 7 - bits), torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    powers = torch.tensor([[2.0 ** (bits * k)] for k in range(127 // bits + 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about quantized tensors being removed
        columns = [part.contiguous() for part in (x ^ 128).view(torch.int8).split(terms, 1)]
        quantized = [torch._make_per_tensor_quantized_tensor(part, 1.0, -128) for part in columns]
        parts = [torch.ops.quantized.linear_prepack(part, None) for part in quantized]

    def times(numbers: Tensor) -> Tensor:
        largest = numbers.abs().max().item()
        count = math.frexp(min(largest, 2.0**119))[1] // bits + 1  # of digits that are not all zero
        pairs = zip(digits(numbers, powers[: count + 1], bits).split(terms, 1), parts, strict=True)
        made = (multiply(rows, 1.0, 2 ** (bits - 1), part).double() for rows, part in pairs)
        sums: Tensor = reduce(torch.add, made).t() @ powers[:count].double()
        return sums if largest < 2.0**120 else sums * math.nan

    return times


def digits(numbers: Tensor, powers: Tensor, bits: int) -> Tensor:  # count + 1 powers
    """Numbers, ``(D, 1)``, as digits from ``-2**(bits - 1)`` to ``2**(bits - 1)``, lowest first, ``(count, D)``."""
    rounded = (numbers.t() / powers).round_()
    return torch.sub(rounded[:-1], rounded[1:], alpha=2**bits)


def over_processes(sums: Tensor) -> Tensor:
    """Add up the whole numbers of all processes, in place."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sums)
    return sums
