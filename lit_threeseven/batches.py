"""Which rows this process sees at this step.

A batch is *global*: `batch_size` rows whatever the number of processes, each of which takes its own share. No row is
dropped and none is seen twice; shares may differ by one row, or be empty. The order depends on (seed, epoch) alone, so
that it is the same on any number of processes and after a resumed run.

The loader is no `torch.utils.data.DataLoader`: Lightning then leaves it alone (no sampler that pads is injected). A
full batch is made ready once; mini-batches are drawn from pixels that stay bytes.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from lit_threeseven.dataset import flatten
from lit_threeseven.pixels import Layout, SparsePixels, store


class Batch(NamedTuple):
    """One process's share of a global batch.

    Attributes:
        x: Pixels, ``(n, 784)`` float32 in [0, 1]; ``n`` may be 0.
        y: Labels, ``(n, 1)`` float32, 0 or 1.
        rows: Rows of the global batch divided by the number of processes. The squared errors of a share are divided by
            it, so that the mean over processes is the mean over the global batch.
    """

    x: Tensor | SparsePixels
    y: Tensor
    rows: float

    def to(self, *args: object, **kwargs: object) -> "Batch":
        """Itself: it is made where it is used, and Lightning need not look into it at every step."""
        return self


class Batches:
    """An iterable of this process's shares of all global batches, with a length.

    Args:
        images: ``(N, 28, 28)`` uint8, on the device that is to use them.
        y: Labels, ``(N, 1)`` float32, on the same device.
        rows: The rows of `images` to take, ``(M,)`` int64; None means all. They are not copied.
        batch_size: Rows of a global batch; None, or more than there are, means all M. The last batch holds the rest.
        shuffle: Whether the rows are put in a new order each epoch. A full batch is never shuffled.
        seed: Of the shuffling, 0 or above.
        rank: Of this process, 0 to ``world_size`` - 1.
        world_size: Number of processes.
        layout: How the pixels of a full batch are stored, see `lit_threeseven.pixels`.
    """

    def __init__(
        self,
        images: Tensor,
        y: Tensor,
        rows: Tensor | None = None,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        layout: Layout = "dense",
    ) -> None:
        self.images, self.y = images, y
        self.rows = torch.arange(len(images)) if rows is None else rows
        self.batch_size = min(batch_size or len(self.rows), len(self.rows))
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.rank, self.world_size = rank, world_size
        self.layout = layout
        self._start = self._seen = 0
        self._full: Batch | None = None

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if len(self) == 1:
            if self._full is None:
                self._full = self._batch(self.rows, partial(store, layout=self.layout))
            yield self._full
            return
        order = self.rows
        if self.shuffle:
            # torch's own generator keeps 32 bits of its seed, too few for two numbers
            order = order[torch.from_numpy(np.random.default_rng((self.seed, self.epoch)).permutation(len(order)))]
        start, self._start = self._start, 0
        batches = order.to(self.images.device).split(self.batch_size)
        for self._seen in range(start + 1, len(batches) + 1):
            yield self._batch(batches[self._seen - 1])

    def _batch(self, rows: Tensor, pixels: Callable = flatten) -> Batch:
        share = rows.split(share_sizes(len(rows), self.world_size))[self.rank]
        return Batch(pixels(self.images[share]), self.y[share], len(rows) / self.world_size)

    # Lightning asks for this when it writes a checkpoint, and gives it back when a run goes on within an epoch.

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch have been seen."""
        return {"seen": self._seen % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out the batches that have been seen from the next epoch that is begun."""
        self._start = state["seen"]

    # Lightning calls `loader.sampler.set_epoch(epoch)` before every training epoch, and looks at `batch_sampler` first.
    batch_sampler = None

    @property
    def sampler(self) -> "Batches":
        """Itself: the loader that knows the order."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch


def share_sizes(rows: int, world_size: int) -> list[int]:
    """Rows of a global batch that each process takes: the first ones get one more where they don't divide."""
    return [rows // world_size + (rank < rows % world_size) for rank in range(world_size)]


def mean_over_processes(*tensors: Tensor) -> list[Tensor]:
    """Average each tensor over the processes, all of them in one exchange; without other processes they stay."""
    if not distributed.is_initialized():
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    parts = flat.div_(distributed.get_world_size()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def gather_objects(value: Any) -> list[Any]:
    """What each process holds, in the order of their ranks, on every process."""
    values = [value]
    if distributed.is_initialized():
        values *= distributed.get_world_size()
        distributed.all_gather_object(values, value)
    return values


def join_shares(share: Tensor, rows: float) -> Tensor:
    """Put the results of all processes together, in the order of the global batch.

    Args:
        share: This process's, ``(n, ...)``.
        rows: See `Batch`.

    Returns:
        ``(N, ...)`` on every process; without other processes the share itself.
    """
    if not distributed.is_initialized():
        return share
    world_size = distributed.get_world_size()
    padded = share.new_zeros(math.ceil(rows), *share.shape[1:])
    padded[: len(share)] = share
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    distributed.all_gather(gathered, padded)
    sizes = share_sizes(round(rows * world_size), world_size)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
