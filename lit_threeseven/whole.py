"""Whole numbers: why two devices give the same bits as one.

A floating-point sum depends on its order, and so on devices, threads and vector widths, because each addition rounds.
A pixel is a byte, a byte times a whole number is a whole number, and a sum of whole numbers has no order. So weights
and slopes are rounded to whole numbers of a fine grid before they are multiplied, and a sum is rounded once, at the end.
Everything else acts on single numbers, by operations that IEEE 754 defines to the last bit.

A whole number is written in digits of 7 bits, and four digits are a word. A sum of 2^10 products of a byte and a digit
fits into float32's 24 bits and one of 2^17 into int32, one of a byte and a word into float64's 53 bits.
"""

import math
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from timeit import timeit
from typing import Any

import torch
from torch import Tensor, distributed

BITS, WORD = 7, 4  # of a digit; digits of a word
TERMS = 2**17  # of a sum
ROWS = 512  # images whose bytes are made float64 at once on a CPU: as many as stay in its cache

Product = Callable[[Tensor, Tensor], Tensor]


def digits(x: Tensor, words: int) -> Tensor:
    """Numbers, ``(N, 1)`` float32 below ``2**(28 * words - 1)``, rounded to whole ones, in base 128, lowest first.

    The digits, ``(N, 4 * words)`` int8, are -64 to 64: some processors add two products in 16 bits; 2 · 255 · 64 fits.
    """
    rounded = (x / (1 << BITS * torch.arange(WORD * words, device=x.device)).float()).round_()
    rounded[:, :-1] -= 128 * rounded[:, 1:]
    return rounded.to(torch.int8)


def words(digits: Tensor) -> Tensor:
    """The words of digits, or of sums of digits: ``(N, 4 * words)`` as ``(N, words)`` float64."""
    powers = (1 << BITS * torch.arange(WORD, device=digits.device)).double()
    return digits.unflatten(1, (-1, WORD)).double() @ powers


def by_integers(x: Tensor, digits: Tensor) -> Tensor:
    """Bytes, ``(N, D)``, times digits, ``(D, 4 * words)``, as words, ``(N, words)`` int64: torch's integer product."""
    parts = zip(x.split(TERMS, 1), digits.split(TERMS), strict=True)
    return torch.stack([words(torch._int_mm(*part)).long() for part in parts]).sum(0)


def by_float64(x: Tensor, digits: Tensor) -> Tensor:
    """The same in float64, which every device has but Apple's."""
    rows, numbers = ROWS if x.device.type == "cpu" else TERMS // 8, words(digits)
    if len(x) > x.shape[1]:
        return torch.cat([_by_columns(part, numbers) for part in x.split(rows)])
    parts = zip(x.split(rows, 1), numbers.split(rows), strict=True)
    return torch.stack([_by_columns(*part) for part in parts]).sum(0)


def _by_columns(x: Tensor, numbers: Tensor) -> Tensor:
    x = x.double()
    return torch.stack([x @ column for column in numbers.unbind(1)], 1).long()  # much faster than one product


class Packed:
    """Bytes as FBGEMM multiplies them, which is fast without VNNI too: pixels minus 128, packed once in each direction.

    A sum of its is float32, so at most 1,028 products of a byte and a digit are added at once.
    """

    def __init__(self, x: Tensor) -> None:
        self.rows, self.columns = ([self.pack(part) for part in parts] for parts in ([x], x.t().split(1028, 1)))

    @staticmethod
    def pack(x: Tensor) -> Any:
        """Bytes, ``(N, D)`` with D up to 1,028, for `multiply`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that quantized tensors will be removed; then `fastest` does without
            numbers = torch._make_per_tensor_quantized_tensor((x ^ 128).contiguous().view(torch.int8), 1.0, -128)
            return torch.ops.quantized.linear_prepack(numbers, None)

    def times(self, digits: Tensor, transposed: bool = False) -> Tensor:
        """``x @ digits`` or its transpose's, as `by_integers`."""
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        parts = zip(digits.split(1028), self.columns, strict=True) if transposed else [(digits, self.rows[0])]
        sums = torch.stack([multiply(part.t().float(), 1.0, 64, packed) for part, packed in parts])
        return words(sums.double().sum(0).t()).long()


def by_packing(x: Tensor, digits: Tensor) -> Tensor:
    """The same by `Packed`."""
    return Packed(x).times(digits)


@cache
def seconds(product: Product) -> float:
    """How long a product takes on this CPU; infinitely long if it is not there or not exact."""
    x = torch.arange(256 * 784).view(256, 784).remainder(256).byte() | 192
    numbers = torch.tensor([64, -64]).repeat(392, 4).to(torch.int8)
    numbers = torch.cat([numbers, -numbers])
    try:
        if torch.equal(product(x, numbers), by_float64(x, numbers)):
            return timeit(lambda: product(x, numbers), number=3)
    except (AttributeError, RuntimeError):  # all but float64's have no public names: they may be gone, or refuse
        pass
    return math.inf


KEPT: dict[int, Callable[[Tensor, Tensor, bool], Tensor]] = {}


def keep(x: Tensor) -> None:
    """Prepare bytes, ``(N, 784)``, that will be multiplied at each step, which takes up to two bytes more for each."""
    if x.device.type != "cpu" or not 0 < len(x) <= TERMS:
        return
    if fastest(x.device) is by_integers:
        columns = x.t().contiguous()  # a third faster
        KEPT[id(x)] = lambda x, digits, transposed: by_integers(columns if transposed else x, digits)
    elif seconds(by_packing) < math.inf:
        packed = Packed(x)
        KEPT[id(x)] = lambda x, digits, transposed: packed.times(digits, transposed)
    weakref.finalize(x, KEPT.pop, id(x), None)


def fastest(device: torch.device) -> Product:
    """The product of bytes that are not kept; which it is changes no bit."""
    return min((by_float64, by_integers), key=seconds) if device.type == "cpu" else by_float64


def times(x: Tensor, digits: Tensor, transposed: bool = False) -> Tensor:
    """Bytes, ``(N, D)``, or their transpose, times digits, ``(D, 4 * words)``, as words, ``(N, words)`` int64."""
    if id(x) in KEPT:
        return KEPT[id(x)](x, digits, transposed)
    return fastest(x.device)(x.t() if transposed else x, digits)


def over_processes(sums: Tensor) -> Tensor:
    """Whole numbers of all processes added up, in place."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sums)
    return sums
