"""Whole numbers: why two devices give the same bits as one.

A floating-point sum depends on its order, and so on devices, threads and vector widths, because each addition rounds.
A pixel is a byte, a byte times a whole number is a whole number, and a sum of whole numbers has no order. So weights
and slopes are rounded to whole numbers of a fine grid before they are multiplied, and a sum is rounded once, last.
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


@cache
@torch.inference_mode(False)
def powers(device: torch.device, digits: int) -> Tensor:
    """What the digits of a number stand for: 128 to the power of 0, 1, …, float64."""
    return (1 << BITS * torch.arange(digits, device=device)).double()


def digits(x: Tensor, words: int) -> Tensor:
    """Round numbers to whole ones, and write them in base 128, the lowest digit first.

    Args:
        x: ``(N, 1)`` float32, up to ``2**(28 * words - 1)``. Nothing but a fraction is rounded.
        words: Words of each number.

    Returns:
        ``(4 * words, N)`` float32, -64 to 64: some processors add two products in 16 bits, and 2 · 255 · 64 fits.
    """
    rounded = (x.t() * (1 / powers(x.device, WORD * words)).float().unsqueeze(1)).round_()
    rounded[:-1] -= 128 * rounded[1:]
    return rounded


def words(digits: Tensor) -> Tensor:
    """The words of digits, or of sums of digits: ``(4 * words, N)`` as ``(words, N)`` int64."""
    return (powers(digits.device, WORD) @ digits.unflatten(0, (-1, WORD)).double()).long()


def by_integers(x: Tensor, digits: Tensor) -> Tensor:
    """Bytes, ``(N, D)``, times digits, ``(4 * words, D)``, as words, ``(words, N)``, by torch's integer product."""
    parts = zip(x.split(TERMS, 1), digits.to(torch.int8).split(TERMS, 1), strict=True)
    return torch.stack([words(torch._int_mm(part, numbers.t()).t()) for part, numbers in parts]).sum(0)


def by_float64(x: Tensor, digits: Tensor) -> Tensor:
    """The same in float64, which every device has but Apple's."""
    rows, numbers = ROWS if x.device.type == "cpu" else TERMS // 8, words(digits).double()
    if len(x) > x.shape[1]:
        return torch.cat([_by_word(part, numbers) for part in x.split(rows)], 1)
    parts = zip(x.split(rows, 1), numbers.split(rows, 1), strict=True)
    return torch.stack([_by_word(*part) for part in parts]).sum(0)


def _by_word(x: Tensor, numbers: Tensor) -> Tensor:
    x = x.double()
    return torch.stack([x @ word for word in numbers]).long()  # much faster than one product


class Packed:
    """Bytes as FBGEMM multiplies them, which is fast without VNNI too: pixels minus 128, packed once in each direction.

    Its sums are float32, so they are taken in parts, each of pixels that are 2^18 at most in total.
    """

    def __init__(self, x: Tensor) -> None:
        self.by_rows, self.by_columns = self.pack(x), self.pack(x.t())

    @staticmethod
    def pack(x: Tensor) -> tuple[int, list[Any]]:
        """Parts of the columns of bytes, ``(N, D)``, and how many columns a part has."""
        parts = max(1, -(-int(x.sum(1).max()) // 2**18))
        while max(part.sum(1).max() for part in x.split(-(-x.shape[1] // parts), 1)) > 2**18:
            parts += 1
        size = -(-x.shape[1] // parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that quantized tensors will be removed; then `seconds` does without
            signed = (x ^ 128).view(torch.int8).split(size, 1)
            numbers = [torch._make_per_tensor_quantized_tensor(part.contiguous(), 1.0, -128) for part in signed]
            return size, [torch.ops.quantized.linear_prepack(part, None) for part in numbers]

    def times(self, digits: Tensor, transposed: bool = False) -> Tensor:
        """The bytes, or their transpose, times digits, as `by_integers`."""
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        size, parts = self.by_columns if transposed else self.by_rows
        pairs = zip(digits.split(size, 1), parts, strict=True)
        sums = torch.stack([multiply(numbers, 1.0, 64, part) for numbers, part in pairs])
        return words(sums.sum(0, dtype=torch.float64))


def by_packing(x: Tensor, digits: Tensor) -> Tensor:
    """The same by `Packed`."""
    return Packed(x).times(digits)


@cache
def seconds(product: Product) -> float:
    """How long a product takes on this CPU; infinitely long if it is not there or not exact."""
    x = torch.arange(256 * 784).view(256, 784).remainder(256).byte() | 192
    numbers = 64.0 - 128 * (torch.arange(784) // 392 + torch.arange(8).unsqueeze(1)).remainder(2)
    try:
        if torch.equal(product(x, numbers), by_float64(x, numbers)):
            return timeit(lambda: product(x, numbers), number=3)
    except (AttributeError, RuntimeError):  # all but float64's have no public names: they may be gone, or refuse
        pass
    return math.inf


KEPT: dict[int, Callable[[Tensor, Tensor, bool], Tensor]] = {}


def keep(x: Tensor) -> None:
    """Prepare bytes, ``(N, 784)``, that are multiplied at each step and never change; it takes twice their memory."""
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
    """Bytes, ``(N, D)``, or their transpose, times digits, ``(4 * words, D)``, as words, ``(words, N)`` int64."""
    if id(x) in KEPT:
        return KEPT[id(x)](x, digits, transposed)
    return fastest(x.device)(x.t() if transposed else x, digits)


def over_processes(sums: Tensor) -> Tensor:
    """Whole numbers of all processes added up, in place."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sums)
    return sums
