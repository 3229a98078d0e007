"""How pixels become numbers, and how those of a full batch are stored for a fast product.

A full batch is read twice a step, once for the prediction and once for the gradient, and that reading is nearly all of
the work. Four fifths of MNIST's pixels are zero, so a sparse matrix leaves the least to read: it is in compressed
sparse row (CSR) format, stored once by rows and once by columns.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scale(pixels: Tensor) -> Tensor:
    """Bytes, 0 to 255, as float32 in [0, 1], of any shape."""
    return pixels / 255


def flatten(images: Tensor) -> Tensor:
    """Turn bytes into the network's input: one row per image, every pixel divided by 255.

    Args:
        images: ``(N, 28, 28)`` or ``(N, 784)`` uint8, 0 to 255.

    Returns:
        ``(N, 784)`` float32 in [0, 1].
    """
    return scale(images.flatten(1))


class SparsePixels:
    """A sparse matrix that replaces a dense ``(N, 784)`` tensor in ``x @ W``, gradient included.

    It lives on the CPU, never changes, and needs a torch with MKL.

    Args:
        images: ``(N, 28, 28)`` uint8, 0 to 255.
    """

    def __init__(self, images: Tensor) -> None:
        pixels = images.flatten(1)
        self.shape = pixels.shape
        self.by_rows, self.by_columns = (csr(part, scale) for part in (pixels, pixels.t()))

    def __matmul__(self, W: Tensor) -> Tensor:
        """Multiply by ``(784, K)``, which may require a gradient; gives ``(N, K)``."""
        return _Product.apply(W, self)

    def flatten(self, start_dim: int = 0) -> "SparsePixels":
        """Itself: it is flat already."""
        return self

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Some rows, ``(M,)`` int64, as a dense matrix, ``(M, 784)``."""
        chosen = torch.zeros(self.shape[0], len(rows))
        chosen[rows, torch.arange(len(rows))] = 1
        return multiply(self.by_columns, chosen).t()

    def __deepcopy__(self, memo: dict) -> "SparsePixels":
        return self


class WholePixels(SparsePixels):
    """Pixels as whole numbers, 0 to 255, in float64, dense or sparse, for the exact step (`exact.py`).

    Args:
        images: ``(N, 28, 28)`` uint8.
        sparse: Whether to store them as a sparse matrix, with the needs of `SparsePixels`.
    """

    def __init__(self, images: Tensor, sparse: bool = False) -> None:
        self.bytes = images.flatten(1)
        self.shape = self.bytes.shape
        if sparse:
            self.by_rows, self.by_columns = (csr(part, Tensor.double) for part in (self.bytes, self.bytes.t()))
        else:
            self.by_rows = self.bytes.double()
            self.by_columns = self.by_rows.t()

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Some rows, ``(M,)`` int64, as float32 in [0, 1], ``(M, 784)``."""
        return scale(self.bytes[rows])


class _Product(torch.autograd.Function):
    """``x @ W`` with ``xᵀ @ gradient`` as its gradient: autograd's own for CSR takes fifty times as long."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, x: SparsePixels) -> Tensor:
        ctx.x = x
        return multiply(x.by_rows, W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return multiply(ctx.x.by_columns, gradient), None


def multiply(matrix: Tensor, dense: Tensor) -> Tensor:
    """A matrix, CSR or dense, times a dense one, by the fastest product."""
    if dense.shape[1] == 1:  # half the time of `mm`
        return torch.mv(matrix, dense.squeeze(1)).unsqueeze(1)
    return torch.mm(matrix, dense)


def csr(pixels: Tensor, number: Callable[[Tensor], Tensor]) -> Tensor:
    """A matrix of bytes in CSR format; `number` makes floating-point numbers of them, and keeps zeros."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        matrix = pixels.contiguous().to_sparse_csr()
        # MKL's product takes 32-bit indices; torch makes 64-bit ones
        crow, col = matrix.crow_indices().int(), matrix.col_indices().int()
        return torch.sparse_csr_tensor(crow, col, number(matrix.values()), matrix.shape, check_invariants=False)
