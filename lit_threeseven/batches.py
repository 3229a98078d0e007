"""Which rows this process sees at this step.

A batch is *global*: `batch_size` rows on any number of processes, each of which takes its own share. No row is
dropped and none is seen twice; shares may differ by one row, or be empty. The order depends on (seed, epoch) alone, so
it is the same on any number of processes and after a resumed run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from lit_threeseven.augment import Affine
from lit_threeseven.pixels import SparsePixels, flatten


@dataclass(eq=False)
class Batch:
    """One process's share of a global batch; ``x, y = batch`` takes it apart.

    Attributes:
        x: Pixels, ``(n, 784)`` float32 in [0, 1]; ``n`` may be 0. A `SparsePixels` only where the module asks for it.
        y: Labels, ``(n, 1)`` float32, 0 or 1.
        global_rows: Rows of the global batch.
        world_size: Processes that share it.
    """

    x: Tensor | SparsePixels
    y: Tensor
    global_rows: int
    world_size: int

    @property
    def divisor(self) -> float:
        """Divide a sum over the share by this, and its average over processes is the mean over all rows."""
        return self.global_rows / self.world_size

    def __iter__(self) -> Iterator[Any]:
        return iter((self.x, self.y))

    def __getitem__(self, i: int) -> Any:
        return (self.x, self.y)[i]

    def to(self, device: torch.device | str, **options: Any) -> "Batch":
        """The batch on a device; itself if it is there already."""
        if isinstance(self.x, SparsePixels) or self.y.device == torch.device(device):
            return self
        x, y = self.x.to(device, **options), self.y.to(device, **options)
        return Batch(x, y, self.global_rows, self.world_size)


class Shares(Dataset[Batch]):
    """A map-style data set: item i is this process's share of the i-th global batch of an epoch.

    Args:
        images: ``(N, 28, 28)`` uint8, on the device that will use them.
        y: Labels, ``(N, 1)`` float32, on the same device.
        batch_size: Rows of a global batch; None, or more than N, means all N. The last batch holds the rest.
        shuffle: Whether each epoch has a new order. A full batch is never shuffled.
        seed: Seed of the shuffling, 0 or above.
        rank: Rank of this process, 0 to ``world_size`` - 1; None asks `torch.distributed` when an item is made.
        world_size: Number of processes; None likewise.
        store: Makes a batch's `x`, of n rows, out of its images, ``(n, 28, 28)`` uint8.
        change: Changes the images, ``(n, 28, 28)`` uint8, by random numbers, ``(n, 5)``, anew each epoch.
    """

    def __init__(
        self,
        images: Tensor,
        y: Tensor,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        store: Callable[[Tensor], Any] = flatten,
        change: Affine | None = None,
    ) -> None:
        self.images, self.y = images, y
        self.batch_size = min(batch_size or len(y), len(y))
        self.shuffle, self.seed, self.store = shuffle and len(self) > 1, seed, store
        self.rank, self.world_size, self.change = rank, world_size, change
        self._full: Batch | None = None  # a full batch is made once
        self._batches = torch.arange(len(y), device=y.device).split(self.batch_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: each has an order of its own, and changes of its own."""
        self.epoch = epoch
        if self.shuffle:
            # torch's own generator keeps 32 bits of its seed, too few for two numbers
            order = torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(len(self.y)))
            self._batches = order.to(self.y.device).split(self.batch_size)

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch_size)

    def __getitem__(self, i: int) -> Batch:
        if self._full is not None:
            return self._full
        rank, world_size = self.rank, self.world_size
        if rank is None or world_size is None:
            together = distributed.is_available() and distributed.is_initialized()
            rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
        rows = self._batches[i]
        share = rows.tensor_split(world_size)[rank]
        images, y = self.images.index_select(0, share), self.y.index_select(0, share)  # faster than images[share]
        if self.change:  # numbers for the rows of all processes, in another sequence than the order's
            numbers = np.random.default_rng((self.seed, self.epoch, i + 1)).uniform(-1, 1, (len(rows), 5))
            images = self.change(images, torch.from_numpy(numbers).tensor_split(world_size)[rank])
        batch = Batch(self.store(images), y, len(rows), world_size)
        if len(self) == 1 and not self.change:
            self._full = batch
        return batch


class InOrder(DistributedSampler, SequentialSampler):
    """Every index of a `Shares` in order; each pass is an epoch, counted from 0 or set with `set_epoch`.

    Its base classes tell Lightning that there are no items to share among processes and no shuffling to undo.
    """

    dataset: Shares

    def __init__(self, shares: Shares) -> None:
        super().__init__(shares, num_replicas=1, rank=0, shuffle=False)
        self.state = {"epoch": 0, "seen": 0}
        self.resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[int]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        self.dataset.set_epoch(epoch)
        start = self.resumed["seen"] if self.resumed and self.resumed["epoch"] == epoch else 0
        self.resumed = None
        for i in range(start, len(self.dataset)):
            self.state = {"epoch": epoch, "seen": i + 1}
            yield i


class Batches(DataLoader[Batch]):
    """A `DataLoader` over a `Shares`; its state is what Lightning needs to resume within an epoch."""

    sampler: InOrder

    def __init__(self, dataset: Shares, **options: Any) -> None:
        super().__init__(dataset, **{"batch_size": None, "sampler": InOrder(dataset)} | options)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were seen."""
        return self.sampler.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip batches already seen in the interrupted epoch."""
        self.sampler.resumed = self.sampler.state = state
