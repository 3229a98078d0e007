"""Which rows this process sees at this step.

A batch is *global*: `batch_size` rows on any number of processes, each of which takes its own share. No row is
dropped and none is seen twice; shares may differ by one row, or be empty. The order depends on (seed, epoch) alone, so
it is the same on any number of processes and after a resumed run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset

from lit_threeseven.errors import UserError
from lit_threeseven.functional import scale
from lit_threeseven.whole import keep


@dataclass(eq=False)
class Batch:
    """One process's share of a global batch; ``x, y = batch`` takes it apart.

    Attributes:
        x: Pixels, ``(n, 784)``: float32 in [0, 1], or uint8 for a module that takes bytes; ``n`` may be 0.
        y: Labels, ``(n, 1)`` float32, 0 or 1.
        rows: Which rows of the data set these are, ``(n,)`` int64.
        global_rows: Rows of the global batch.
        divisor: Divisor of a sum over the share, so that the gradient is that of the mean over the global batch.
            Gradients of floats are averaged over processes, as DDP does; those of bytes are added up, see `linear`.
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    global_rows: int
    divisor: float

    def __repr__(self) -> str:
        return f"Batch({len(self.y):,} of {self.global_rows:,} rows, {str(self.x.dtype)[6:]})"

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.y))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Tensor:
        return (self.x, self.y)[i]

    def to(self, device: torch.device | str, **options: Any) -> "Batch":
        """The batch on a device; itself if it is there already."""
        if self.y.device == torch.device(device):
            return self
        x, y, rows = (tensor.to(device, **options) for tensor in (self.x, self.y, self.rows))
        return Batch(x, y, rows, self.global_rows, self.divisor)


def shared(batch: Any, check: bool = False) -> tuple[Tensor, Tensor, float]:
    """Pixels and labels of any batch ``(x, y)``, and the divisor of the loss, see `Batch.divisor`.

    Args:
        batch: A `Batch`, or a pair from another loader, whose bytes are scaled to floats.
        check: Whether to check the values of a pair from another loader; a GPU has to finish its work for that.

    Raises:
        UserError: If there are labels other than 0 and 1, or pixels beyond [0, 1].
    """
    if isinstance(batch, Batch):
        return batch.x, batch.y, batch.divisor
    x, y, *_ = batch
    x = scale(x)
    if check and len(y) and not ((y == 0) | (y == 1)).all():
        raise UserError(f"Labels must be 1 for the first digit and 0 for the second, got {y.unique().tolist()[:5]}.")
    if check and len(y) and not ((x >= 0) & (x <= 1)).all():
        raise UserError(f"Pixels must be bytes or floats from 0 to 1, got {x.min():.4g} to {x.max():.4g}.")
    return x, y, len(y)


class Order(DistributedSampler[Any], SequentialSampler):
    """The rows of each global batch, ``(batch_size,)`` int64; the last batch of an epoch holds the rest.

    Each pass is an epoch, counted from 0 or set with `set_epoch`, which Lightning does. Its base classes tell Lightning
    that there is nothing to share out among processes and no shuffling to undo. The arguments are those of `Batches`.
    """

    def __init__(self, dataset: TensorDataset, batch_size: int | None, shuffle: bool, seed: int) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)
        self.batch_size = min(batch_size or self.total_size, self.total_size)

    def __iter__(self) -> Iterator[Any]:
        rows = torch.arange(self.total_size)
        if self.shuffle and len(self) > 1:
            # torch's own generator keeps 32 bits of its seed, too few for two numbers
            rows = torch.from_numpy(np.random.default_rng((self.seed, self.epoch)).permutation(self.total_size))
        self.epoch += 1
        return iter(rows.split(self.batch_size))

    def __len__(self) -> int:
        return -(-self.total_size // self.batch_size)


class Batches(DataLoader[Batch]):
    """A `DataLoader` of this process's shares; its state is what Lightning needs to resume within an epoch.

    Args:
        dataset: Images, ``(N, 28, 28)`` uint8, and labels, ``(N, 1)`` float32, on the device that will use them.
        batch_size: Rows of a global batch; None, or more than N, means all N.
        shuffle: Whether each epoch has a new order. A full batch is never shuffled.
        seed: Seed of order and change, 0 or above.
        sampler: An `Order` in place of these three.
        change: Changes the images, ``(n, 28, 28)`` uint8, by random numbers, ``(n, 5)``, new ones in each epoch.
        as_bytes: Whether pixels stay bytes.
        share: Rank of this process and number of processes; None asks `torch.distributed` at each batch.
        **options: Options of a `DataLoader`, which Lightning passes when it makes a copy.
    """

    dataset: TensorDataset  # type: ignore[assignment]  # of rows; the loader makes batches of them
    sampler: Order

    def __init__(
        self,
        dataset: TensorDataset,
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        sampler: Order | None = None,
        change: Callable[[Tensor, Tensor], Tensor] | None = None,
        as_bytes: bool = False,
        share: tuple[int, int] | None = None,
        **options: Any,
    ) -> None:
        sampler = sampler or Order(dataset, batch_size, shuffle, seed)
        super().__init__(cast(Any, dataset), **options | {"batch_size": None, "sampler": sampler})
        self.change, self.as_bytes, self.share = change, as_bytes, share
        self.state = {"epoch": 0, "seen": 0}
        self._resumed: dict[int | None, int] = {}  # epoch: how many of its batches were seen before
        self._full: Batch | None = None  # a full batch that doesn't change is made once

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # no worker processes
        epoch = self.sampler.epoch
        start, self._resumed = self._resumed.get(epoch, 0), {}
        for i, rows in enumerate(self.sampler):
            if i >= start:
                self.state = {"epoch": epoch, "seen": i + 1}
                yield self._full or self._batch(rows, epoch, i)

    @torch.inference_mode(False)  # a batch made in inference mode could not be trained on later
    def _batch(self, rows: Tensor, epoch: int, i: int) -> Batch:
        alone = not (distributed.is_available() and distributed.is_initialized())
        rank, size = self.share or ((0, 1) if alone else (distributed.get_rank(), distributed.get_world_size()))
        images, y = self.dataset.tensors
        chosen = rows.tensor_split(size)[rank].to(y.device)
        images, y = images.index_select(0, chosen), y.index_select(0, chosen)  # faster than images[chosen]
        if self.change:  # numbers for the rows of all processes, from another random sequence than the order
            numbers = np.random.default_rng((self.sampler.seed, epoch, i + 1)).uniform(-1, 1, (len(rows), 5))
            images = self.change(images, torch.from_numpy(numbers).tensor_split(size)[rank])
        x = images.flatten(1) if self.as_bytes else scale(images.flatten(1))
        batch = Batch(x, y, chosen, len(rows), len(rows) / (1 if self.as_bytes else size))
        if len(self) == 1 and not self.change:
            self._full = batch
            if self.as_bytes:
                keep(x)
        return batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were seen."""
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip batches already seen in the interrupted epoch."""
        self.state, self._resumed = state, {state.get("epoch"): state.get("seen", 0)}
