"""How pixels are stored, so that the products with them read as few bytes as possible.

A full batch is read twice a step, once for the prediction and once for the gradient, and that reading is nearly all of
the work. Four fifths of MNIST's pixels are zero, so the least to read is a sparse matrix in compressed sparse row
(CSR) format, kept both by rows and by columns. Where torch has no fast product for it, pixels are dense; on a CPU
those of a full batch lie column by column, which its matrix-vector products read fastest.
"""

import warnings
from typing import Literal

import torch
from torch import Tensor

from lit_threeseven.dataset import flatten, scale

Layout = Literal["dense", "sparse"]


class SparsePixels:
    """Pixels as a sparse matrix that stands in for a dense ``(N, 784)`` tensor in ``x @ W`` and ``x.T @ s``.

    It lives on the CPU and needs a torch with MKL.

    Args:
        images: ``(N, 28, 28)`` uint8, 0 to 255.
    """

    def __init__(self, images: Tensor) -> None:
        pixels = images.flatten(1)
        self._rows, self._columns = _csr(pixels), _csr(pixels.t().contiguous())

    def __len__(self) -> int:
        return self._rows.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of the two copies, by rows and by columns, which are equally large but for the row starts."""
        return sum(
            part.nbytes
            for copy in (self._rows, self._columns)
            for part in (copy.values(), copy.col_indices(), copy.crow_indices())
        )

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Some rows, ``(M,)`` int64, as a dense matrix, ``(M, 784)``."""
        starts, columns, values = self._rows.crow_indices(), self._rows.col_indices(), self._rows.values()
        dense = torch.zeros(len(rows), self._rows.shape[1])
        for row, target in zip(rows.tolist(), dense, strict=True):
            part = slice(starts[row], starts[row + 1])
            target[columns[part].long()] = values[part]
        return dense

    def flatten(self, start_dim: int) -> "SparsePixels":
        """Itself, which is flat."""
        return self

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Multiply with a column, ``(784, 1)``; gives ``(N, 1)``."""
        return torch.mv(self._rows, vector.squeeze(1)).unsqueeze(1)

    @property
    def T(self) -> "SparsePixels":  # noqa: N802
        """The transposed matrix, ``(784, N)``."""
        transposed = object.__new__(SparsePixels)
        transposed._rows, transposed._columns = self._columns, self._rows
        return transposed


def _csr(pixels: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        csr = pixels.to_sparse_csr()
        # MKL's product takes 32-bit indices; torch makes 64-bit ones
        crow, col = csr.crow_indices().int(), csr.col_indices().int()
        return torch.sparse_csr_tensor(crow, col, scale(csr.values()), csr.shape, check_invariants=False)


def store(images: Tensor, layout: Layout) -> Tensor | SparsePixels:
    """Store the pixels of a full batch for many products.

    Args:
        images: ``(N, 28, 28)`` uint8, 0 to 255.
        layout: "sparse" (see `sparse_obstacle`) or "dense".

    Returns:
        The matrix ``(N, 784)`` of float32 in [0, 1]: a `SparsePixels`, or a tensor that on a CPU lies column by column.
    """
    if layout == "sparse":
        return SparsePixels(images)
    x = flatten(images)
    return x.t().contiguous().t() if x.device.type == "cpu" else x


def sparse_obstacle(device: torch.device, full_batch: bool, precision: str = "32-true") -> str | None:
    """Why the pixels can't be sparse, as a part of a sentence, or None where they can.

    Args:
        device: Where the network is.
        full_batch: Whether a batch is the whole set.
        precision: The Trainer's.
    """
    if not full_batch:
        return "batch_size makes mini-batches, and only a full batch is stored once for all steps"
    if device.type != "cpu":
        return f"the network is on {device}, and sparse products are fast on CPUs only"
    if precision != "32-true":
        return f"the Trainer's precision is {precision}, and sparse pixels are float32"
    if not torch.backends.mkl.is_available():
        return "this torch was built without MKL, which the sparse product needs"
    return None
