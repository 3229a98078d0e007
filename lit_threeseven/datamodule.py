"""`ThreeSevenDataModule`: source, split and batches, joined for Lightning."""

from typing import NamedTuple, get_args

import lightning as L
import torch
from torch import Tensor

from lit_threeseven import dataset
from lit_threeseven.batches import Batches
from lit_threeseven.dataset import BUNDLED_DIGITS, Source
from lit_threeseven.errors import UserError


class Split(NamedTuple):
    """A part of the data.

    Attributes:
        images: ``(N, 28, 28)`` uint8, 0 to 255.
        y: Labels, ``(N, 1)`` float32: 1 for the first of the two digits, 0 for the second.
    """

    images: Tensor
    y: Tensor


class ThreeSevenDataModule(L.LightningDataModule):
    """MNIST's threes and sevens, filtered, scaled to [0, 1], flattened to 784 columns and labelled.

    After `setup`, `train`, `val` and `test` hold the parts as `Split`s. `val` is taken out of MNIST's training set;
    MNIST's test set is used for testing and predicting only.

    Args:
        source: Where the images come from. "bundled": the real threes and sevens that are shipped with this package.
            "torchvision": all of MNIST in `data_dir`, downloaded if absent.
        data_dir: Folder for source "torchvision", laid out as torchvision does (MNIST/raw/...).
        digits: The two digits to tell apart, 0 to 9. The first gets label 1, the second label 0. The bundled data
            holds 3 and 7.
        batch_size: Images per training step, on all devices together. null (None) is all of them at once: one step
            per epoch.
        val_fraction: Share of the training images that is held out for validation, from 0 to less than 1, the same
            share of both digits. With 0 all of them train and no validation runs.
        seed: Chooses the held-out images and the order of shuffled batches, 0 to 2³¹ - 1. The starting weights do not
            depend on it.

    Raises:
        UserError: If an argument is out of its range.

    Example:
        >>> data = ThreeSevenDataModule(val_fraction=0)
        >>> data.setup("fit")
        >>> data.train.images.shape, data.train.y.mean()
        (torch.Size([12396, 28, 28]), tensor(0.4946))
    """

    def __init__(
        self,
        source: Source = "bundled",
        data_dir: str = "data",
        digits: tuple[int, int] = (3, 7),
        batch_size: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        digits = tuple(digits)
        if source not in get_args(Source):
            raise UserError(f"source must be one of {', '.join(get_args(Source))}, got {source!r}.")
        if len(digits) != 2 or digits[0] == digits[1] or not set(digits) <= set(range(10)):
            raise UserError(f"digits must be two different digits from 0 to 9, such as [3, 7], got {list(digits)}.")
        if source == "bundled" and set(digits) != set(BUNDLED_DIGITS):
            raise UserError(
                f"The bundled data holds the digits {list(BUNDLED_DIGITS)}, got digits {list(digits)}; "
                "all ten are in MNIST itself: --data.source torchvision."
            )
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, or null (None) for all images at once, got {batch_size}.")
        if not 0 <= val_fraction < 1:
            raise UserError(f"val_fraction must be from 0 to less than 1, got {val_fraction}.")
        if not 0 <= seed < 2**31:
            raise UserError(f"seed must be from 0 to 2147483647, got {seed}.")
        self.save_hyperparameters()
        self.source, self.data_dir, self.digits = source, data_dir, digits
        self.batch_size, self.val_fraction, self.seed = batch_size, val_fraction, seed

    def prepare_data(self) -> None:
        """Download what is absent and check all files, once per machine and before anything else is written."""
        dataset.prepare(self.source, self.data_dir, self.digits)

    def setup(self, stage: str | None = None) -> None:
        """Read the images that a stage needs: the training set's for "fit" and "validate", otherwise the test set's."""
        if stage in ("fit", "validate", None):
            images, y = dataset.load(self.source, self.data_dir, self.digits, train=True)
            train, val = stratified_split(y, self.val_fraction, self.seed)
            self.train, self.val = Split(images[train], y[train]), Split(images[val], y[val])
        if stage in ("test", "predict", None):
            self.test = Split(*dataset.load(self.source, self.data_dir, self.digits, train=False))

    def train_dataloader(self) -> Batches:
        """The training images, shuffled anew each epoch unless they are one batch."""
        return self._batches(self.train, shuffle=True)

    def val_dataloader(self) -> Batches | list:
        """The held-out images in their own order; an empty list where `val_fraction` is 0."""
        return self._batches(self.val) if self.val_fraction else []

    def test_dataloader(self) -> Batches:
        """MNIST's test images in their own order."""
        return self._batches(self.test)

    def predict_dataloader(self) -> Batches:
        """MNIST's test images in their own order."""
        return self._batches(self.test)

    def _batches(self, split: Split, shuffle: bool = False) -> Batches:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return Batches(*split, self.batch_size, shuffle=shuffle, seed=self.seed, rank=rank, world_size=world_size)


def stratified_split(y: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide rows into training and validation, taking the same fraction of every label.

    Args:
        y: Labels, ``(N, 1)``.
        val_fraction: From 0 to less than 1. Above 0, at least one row of each label is held out and one is left.
        seed: Of the choice.

    Returns:
        The rows for training and those for validation, int64, each in ascending order.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        rows = (y.squeeze(1) == label).nonzero().squeeze(1)
        count = round(len(rows) * val_fraction)
        if val_fraction:
            count = min(max(count, 1), len(rows) - 1)
        held_out[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)
