"""Which rows this process sees at this step.

A batch is *global*: `batch_size` rows whatever the number of processes, each of which takes its own share. No row is
dropped and none is seen twice; shares may differ by one row, or be empty. The order depends on (seed, epoch) alone, so
that it is the same on any number of processes and after a resumed run.

The loader is no `torch.utils.data.DataLoader`: Lightning then leaves it alone (no sampler that pads is injected), and
a full batch costs nothing but the look-up of two tensors that are ready.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_threeseven.dataset import flatten


class Batch(NamedTuple):
    """One process's share of a global batch.

    Attributes:
        x: Pixels, ``(n, 784)`` float32 in [0, 1]; ``n`` may be 0.
        y: Labels, ``(n, 1)`` float32, 0 or 1.
        rows: Rows of the global batch divided by the number of processes. The squared errors of a share are divided by
            it, so that the mean over processes, which DDP takes, is the mean over the global batch.
    """

    x: Tensor
    y: Tensor
    rows: float


class Batches:
    """An iterable of this process's shares of all global batches, with a length.

    Args:
        images: ``(N, 28, 28)`` uint8.
        y: Labels, ``(N, 1)`` float32.
        batch_size: Rows of a global batch; None, or more than there are, means all N. The last batch holds the rest.
        shuffle: Whether the rows are put in a new order each epoch. A full batch is never shuffled.
        seed: Of the shuffling, 0 to 2³¹ - 1.
        rank: Of this process, 0 to ``world_size`` - 1.
        world_size: Number of processes.
    """

    def __init__(
        self,
        images: Tensor,
        y: Tensor,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.y = images, y
        self.batch_size = min(batch_size or len(images), len(images))
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.rank, self.world_size = rank, world_size
        self._full: Batch | None = None

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if len(self) == 1:
            if self._full is None:
                share = torch.arange(len(self.images)).tensor_split(self.world_size)[self.rank]
                self._full = self._batch(share, len(self.images))
            yield self._full
            return
        order = torch.arange(len(self.images))
        if self.shuffle:
            # torch's own generator keeps 32 bits of its seed, too few for two numbers
            order = torch.from_numpy(np.random.default_rng((self.seed, self.epoch)).permutation(len(self.images)))
        for rows in order.split(self.batch_size):
            yield self._batch(rows.tensor_split(self.world_size)[self.rank], len(rows))

    def _batch(self, share: Tensor, rows: int) -> Batch:
        return Batch(flatten(self.images[share]), self.y[share], rows / self.world_size)

    # Lightning calls `loader.sampler.set_epoch(epoch)` before every training epoch, and looks at `batch_sampler` first.
    batch_sampler = None

    @property
    def sampler(self) -> "Batches":
        """Itself: the loader that knows the order."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch
