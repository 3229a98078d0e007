"""Whole numbers: why two devices give the same bits as one.

A floating-point sum depends on its order, and so on devices, threads and vector widths, because each addition rounds.
A pixel is a byte, a byte times a whole number is a whole number, and a sum of whole numbers has no order. So weights
and slopes are rounded to whole numbers of a fine grid before they are multiplied, and a sum is rounded once, last.
Everything else acts on single numbers, by operations that IEEE 754 defines to the last bit.

A number is written in words of 28 bits: a sum of 2^17 products of a byte and a word fits into float64's 53 bits.
"""

import warnings
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed

WORD = 28  # bits
BITS = 4  # of a digit of a packed product
TERMS = 2**13  # of a packed sum, which is float32: a product of a byte and a digit, -8 to 8, has 11 bits
ROWS = 512  # images whose bytes are made float64 at once on a CPU: as many as stay in its cache


@cache
@torch.inference_mode(False)
def powers(device: torch.device, bits: int, digits: int) -> tuple[Tensor, Tensor]:
    """What each digit stands for: 2 to the power of 0, `bits`, …, ``(digits,)`` float64; and one over it, a column."""
    values = (1 << bits * torch.arange(digits, device=device)).double()
    return values, (1 / values).unsqueeze(1)


def split(numbers: Tensor, bits: int, digits: int) -> Tensor:
    """Round numbers to whole ones, and write them in `digits` digits of `bits` bits, the lowest first.

    Args:
        numbers: ``(N, 1)`` floats, up to ``2**(bits * digits - 1)``. Nothing but a fraction is rounded.
        bits: Of a digit, which is from ``-2**(bits - 1)`` to ``2**(bits - 1)``.
        digits: How many.

    Returns:
        ``(digits, N)``, of the type of `numbers`.
    """
    parts = (numbers.t() * powers(numbers.device, bits, digits)[1].to(numbers.dtype)).round_()
    parts[:-1] -= 2**bits * parts[1:]
    return parts


class Product:
    """Bytes, ``(N, D)``, times whole numbers in float64, which every device has but Apple's."""

    def __init__(self, x: Tensor) -> None:
        self.x = x if len(x) > ROWS else x.double()
        self.rows = ROWS if x.device.type == "cpu" else 2**14

    def times(self, numbers: Tensor) -> Tensor:
        """The sums of each row: numbers, ``(D, 1)`` float32, as one word; ``(N,)`` float64."""
        word = split(numbers.double(), WORD, 1)[0]
        return torch.cat([x.double() @ word for x in self.x.split(self.rows)])

    def transposed_times(self, numbers: Tensor) -> Tensor:
        """The sums of each column: numbers, ``(N, 1)`` float32, as two words; last that of a column of ones.

        Returns:
            ``(2, D + 1)`` float64.
        """
        words = split(numbers.double(), WORD, 2)
        pairs = zip(self.x.split(self.rows), words.split(self.rows, 1), strict=True)
        parts = [[word @ x for word in part] for x, part in ((x.double(), part) for x, part in pairs)]
        sums = torch.stack([torch.stack(part) for part in parts]).sum(0)
        return torch.cat([sums, words.sum(1, keepdim=True)], 1)


class Packed:
    """The same by FBGEMM's integer product: bytes minus 128, packed once in each direction, times digits of 4 bits."""

    def __init__(self, x: Tensor) -> None:
        self.by_rows, self.by_columns = self.pack(x), self.pack(torch.cat([x.t(), x.new_ones(1, len(x))]))

    @staticmethod
    def pack(x: Tensor) -> list[Any]:
        """Parts of the columns of bytes, ``(N, D)``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that quantized tensors will be removed; then `packs` says no
            parts = [part.contiguous() for part in (x ^ 128).view(torch.int8).split(TERMS, 1)]
            numbers = [torch._make_per_tensor_quantized_tensor(part, 1.0, -128) for part in parts]
            return [torch.ops.quantized.linear_prepack(part, None) for part in numbers]

    @staticmethod
    def multiply(numbers: Tensor, words: int, parts: list[Any]) -> Tensor:
        """Sums of numbers, ``(D, 1)``, times a packed matrix, as words, ``(words, N)`` float64."""
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        each = WORD // BITS
        pairs = zip(split(numbers, BITS, words * each).split(TERMS, 1), parts, strict=True)
        sums = torch.stack([multiply(digits, 1.0, 2 ** (BITS - 1), part) for digits, part in pairs])
        total = sums.sum(0, dtype=torch.float64).view(words, each, -1)
        return powers(numbers.device, BITS, each)[0] @ total

    def times(self, numbers: Tensor) -> Tensor:
        """As `Product.times`."""
        return self.multiply(numbers, 1, self.by_rows)[0]

    def transposed_times(self, numbers: Tensor) -> Tensor:
        """As `Product.transposed_times`."""
        return self.multiply(numbers, 2, self.by_columns)


@cache
def packs() -> bool:
    """Whether `Packed` is there and exact: these functions have no public names, so they may be gone, or refuse."""
    x = torch.arange(300 * 50).view(300, 50).remainder(256).byte()
    numbers = torch.arange(300).mul(2**31 // 7).remainder(2**27).sub(2**26).float().unsqueeze(1)
    try:
        made = [(way.times(numbers[:50]), way.transposed_times(numbers)) for way in (Packed(x), Product(x))]
    except (AttributeError, RuntimeError):
        return False
    return all(map(torch.equal, *made))


KEPT: dict[int, Packed] = {}


def keep(x: Tensor) -> None:
    """Pack bytes, ``(N, D)``, that are multiplied at each step and never change, where that is possible."""
    if x.device.type == "cpu" and 0 < len(x) <= 2**17 and packs():
        KEPT[id(x)] = Packed(x)
        weakref.finalize(x, KEPT.pop, id(x), None)


def product(x: Tensor) -> Product | Packed:
    """What multiplies bytes, ``(N, D)``; which it is changes no bit."""
    return KEPT.get(id(x)) or Product(x)


def over_processes(sums: Tensor) -> Tensor:
    """Whole numbers of all processes added up, in place."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sums)
    return sums
