"""`ThreeSevenDataModule`: source, split and batches, joined for Lightning."""

from typing import Literal, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_threeseven import dataset
from lit_threeseven.batches import Batches
from lit_threeseven.dataset import BUNDLED_DIGITS, Source
from lit_threeseven.errors import UserError
from lit_threeseven.pixels import Layout, sparse_obstacle


class Split:
    """A part of the data: some rows of a set of images, not copied.

    Attributes:
        rows: Which rows of the set, ``(N,)`` int64.
    """

    def __init__(self, images: Tensor, y: Tensor, rows: Tensor) -> None:
        self._images, self._y, self.rows = images, y, rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> Tensor:
        """A copy of the images, ``(N, 28, 28)`` uint8, 0 to 255."""
        return self._images[self.rows]

    @property
    def y(self) -> Tensor:
        """A copy of the labels, ``(N, 1)`` float32: 1 for the first of the two digits, 0 for the second."""
        return self._y[self.rows]

    def batches(self, batch_size: int | None, device: torch.device, **options: object) -> Batches:
        """Loader of these rows, with the whole set's bytes on a device; `options` are those of `Batches`."""
        return Batches(self._images.to(device), self._y.to(device), self.rows, batch_size, **options)


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
        pixels: How the pixels of a full training batch are stored. "sparse" is fastest, and needs a CPU and a torch
            with MKL. "auto" takes it where it can be had and "dense" elsewhere. The result is the same.

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
        pixels: Literal["auto", "dense", "sparse"] = "auto",
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
        if pixels not in ("auto", "dense", "sparse"):
            raise UserError(f"pixels must be auto, dense or sparse, got {pixels!r}.")
        if not 0 <= seed < 2**31:
            raise UserError(f"seed must be from 0 to 2147483647, got {seed}.")
        self.save_hyperparameters()
        self.source, self.data_dir, self.digits = source, data_dir, digits
        self.batch_size, self.val_fraction = batch_size, val_fraction
        self.pixels, self.seed = pixels, seed

    # There is no `prepare_data`: around it Lightning waits for other processes without a time limit.

    def setup(self, stage: str | None = None) -> None:
        """Download what is absent, once per machine, and read the images that a stage needs.

        They are the training set's for "fit" and "validate", the test set's for "test" and "predict", otherwise both.

        Raises:
            UserError: If a file is missing or damaged, or if `pixels` is "sparse" where that can't work.
        """
        if self.trainer is None or self.trainer.local_rank == 0:
            dataset.prepare(self.source, self.data_dir)
        if self.trainer:
            self.trainer.strategy.barrier()
        if stage in ("fit", "validate", None):
            images, y = dataset.load(self.source, self.data_dir, self.digits, train=True)
            train, val = stratified_split(y, self.val_fraction, self.seed)
            self.train, self.val = Split(images, y, train), Split(images, y, val)
        if stage in ("fit", None):
            self._layout = self._choose_layout()
        if stage in ("test", "predict", None):
            images, y = dataset.load(self.source, self.data_dir, self.digits, train=False)
            self.test = Split(images, y, torch.arange(len(y)))

    def train_dataloader(self) -> Batches:
        """The training images, shuffled anew each epoch unless they are one batch."""
        if self.batch_size and self.batch_size > len(self.train):
            rank_zero_warn(
                f"batch_size {self.batch_size} is more than the {len(self.train)} training images: "
                "every epoch is one full batch."
            )
        batches = self._batches(self.train, shuffle=True, layout=self._layout)
        if batches.world_size > batches.batch_size:
            rank_zero_warn(
                f"{batches.world_size} processes share batches of {batches.batch_size} images: some have nothing to do."
            )
        return batches

    def val_dataloader(self) -> Batches | list:
        """The held-out images in their own order; an empty list where `val_fraction` is 0."""
        return self._batches(self.val) if self.val_fraction else []

    def test_dataloader(self) -> Batches:
        """MNIST's test images in their own order."""
        return self._batches(self.test)

    def predict_dataloader(self) -> Batches:
        """MNIST's test images in their own order."""
        return self._batches(self.test)

    def _choose_layout(self) -> Layout:
        full_batch = self.batch_size is None or self.batch_size >= len(self.train)
        obstacle = sparse_obstacle(self._device, full_batch, self.trainer.precision if self.trainer else "32-true")
        if self.pixels == "sparse" and obstacle:
            raise UserError(f"pixels=sparse can't work here: {obstacle}; use pixels=auto.")
        return "dense" if obstacle or self.pixels == "dense" else "sparse"

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _batches(self, split: Split, **options: object) -> Batches:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        options |= {"seed": self.seed, "rank": rank, "world_size": world_size}
        return split.batches(self.batch_size, self._device, **options)


def stratified_split(y: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide rows into training and validation, taking the same fraction of every label.

    Args:
        y: Labels, ``(N, 1)``.
        val_fraction: From 0 to less than 1. Above 0, at least one row of each label is held out and one is left.
        seed: Of the choice.

    Returns:
        The rows for training and those for validation, int64, each in ascending order.
    """
    random = np.random.default_rng(seed)
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        rows = (y.squeeze(1) == label).nonzero().squeeze(1)
        count = round(len(rows) * val_fraction)
        if val_fraction:
            count = min(max(count, 1), len(rows) - 1)
        held_out[rows[torch.from_numpy(random.permutation(len(rows)))[:count]]] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)
