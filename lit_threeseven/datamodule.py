"""`ThreeSevenDataModule`: source, split and batches for Lightning."""

import warnings
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import TensorDataset

from lit_threeseven import dataset
from lit_threeseven.augment import affine
from lit_threeseven.batches import Batches
from lit_threeseven.dataset import BUNDLED_DIGITS, check_digits
from lit_threeseven.download import download
from lit_threeseven.errors import UserError
from lit_threeseven.resumable import ResumableData, plain


class ThreeSevenDataModule(ResumableData):
    """MNIST's threes and sevens: filtered, scaled to [0, 1], flattened to 784 columns, and labelled.

    After `setup`, `train`, `val` and `test` are data sets of images, ``(N, 28, 28)`` uint8, 0 to 255, and labels,
    ``(N, 1)`` float32, 0 or 1. `val` is a part of MNIST's training set. MNIST's test set is only for testing and
    predicting. The loaders work with any network, and without a Trainer: ``x, y = batch`` gives ``(n, 784)`` pixels,
    float32 in [0, 1], and ``(n, 1)`` labels. A module that `takes_bytes` gets pixels as uint8.

    Args:
        source: Where the images come from. "bundled": the real threes and sevens shipped with this package.
            "torchvision": all of MNIST in `data_dir`, downloaded if absent.
        data_dir: Folder for source "torchvision", laid out as torchvision does (MNIST/raw/...). null (None) means the
            folder data.
        digits: The two digits to tell apart, 0 to 9. The first gets label 1, the second label 0. The bundled data
            holds 3 and 7.
        batch_size: Images per training step on all devices together. null (None) means all at once: one step per epoch.
        val_fraction: Fraction of the training images held out for validation, from 0 to less than 1, the same for both
            digits. With 0 all images are used for training and no validation runs.
        seed: Chooses the held-out images, the order of shuffled batches, and random changes, 0 to 2³¹ - 1. The starting
            weights do not depend on it.
        rotation: In each epoch, each training image is rotated left or right by up to this many degrees, 0 to 180.
        zoom: In each epoch, its width and its height each grow or shrink by up to this fraction, 0 to 0.99.
        shift: In each epoch, it is moved by up to this many pixels, 0 to 28, sideways, and up or down.

    Raises:
        UserError: If an argument is out of its range.

    Example:
        >>> data = ThreeSevenDataModule(val_fraction=0)
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.mean()
        (torch.Size([12396, 784]), tensor(0.4946))
    """

    train: TensorDataset
    val: TensorDataset
    test: TensorDataset

    def __init__(
        self,
        source: Literal["bundled", "torchvision"] = "bundled",
        data_dir: str | None = None,
        digits: tuple[int, int] = (3, 7),
        batch_size: int | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        rotation: float = 0.0,
        zoom: float = 0.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        digits, data_dir = check_digits(digits), data_dir and str(data_dir)
        batch_size, val_fraction, seed = plain(batch_size), plain(val_fraction), plain(seed)
        if source not in ("bundled", "torchvision"):
            raise UserError(f"source must be bundled or torchvision, got {source!r}.")
        if source == "bundled" and set(digits) != set(BUNDLED_DIGITS):
            raise UserError(f'The bundle holds the digits {BUNDLED_DIGITS}, not {digits}; use source="torchvision".')
        if source == "bundled" and data_dir is not None:
            raise UserError(f'data_dir="{data_dir}" is not used by the bundled data; use source="torchvision".')
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, or null (None) for all images at once, got {batch_size}.")
        if not 0 <= val_fraction < 1:
            raise UserError(f"val_fraction must be from 0 to less than 1, got {val_fraction}.")
        if not 0 <= seed < 2**31:
            raise UserError(f"seed must be from 0 to 2147483647, got {seed}.")
        for name, value, most in (("rotation", rotation, 180), ("zoom", zoom, 0.99), ("shift", shift, 28)):
            if not 0 <= value <= most:
                raise UserError(f"{name} must be from 0 to {most}, got {value}.")
        self.save_hyperparameters()
        self.root = dataset.BUNDLED_ROOT if source == "bundled" else data_dir or "data"
        self.digits, self.batch_size, self.val_fraction, self.seed = digits, batch_size, val_fraction, seed
        self.change = partial(affine, rotation=rotation, zoom=zoom, shift=shift) if rotation or zoom or shift else None

    # There is no `prepare_data`: other processes would wait for it without a time limit.

    def setup(self, stage: str | None = None) -> None:
        """Download missing files, once per machine, and read the images that a stage needs.

        "fit" and "validate" need the training set, "test" and "predict" the test set, and None both.

        Raises:
            UserError: If a file is missing or damaged, or there are too few images of a digit to hold one out.
        """
        if self.root != dataset.BUNDLED_ROOT and (self.trainer is None or self.trainer.local_rank == 0):
            download(self.root)
        if self.trainer:
            self.trainer.strategy.barrier()
        if stage in ("fit", "validate", None) and "train" not in vars(self):
            images, y = dataset.load(self.root, self.digits, train=True)
            held_out = hold_out(y, self.val_fraction, self.seed)
            self.train, self.val = (TensorDataset(images[rows], y[rows]) for rows in (~held_out, held_out))
        if stage in ("test", "predict", None) and "test" not in vars(self):
            self.test = TensorDataset(*dataset.load(self.root, self.digits, train=False))

    def train_dataloader(self) -> Batches:
        """The training images, in a new order each epoch unless they are one batch, or `overfit_batches` is set."""
        trainer: Any = self.trainer  # whose attributes have no types
        vary = not (trainer and trainer.overfit_batches)  # which repeats the same few batches
        loader = self._batches("fit", "train", shuffle=vary, change=self.change if vary else None)
        size, batch = len(loader.dataset), loader.sampler.batch_size
        if self.batch_size and self.batch_size > size:
            rank_zero_warn(f"batch_size={self.batch_size} exceeds the {size} training images: one batch per epoch.")
        if trainer and trainer.world_size > batch:
            rank_zero_warn(f"{trainer.world_size} processes share batches of {batch} images: some have nothing to do.")
        return loader

    def val_dataloader(self) -> Batches | list[Batches]:
        """The held-out images in their own order; an empty list if `val_fraction` is 0."""
        return self._batches("validate", "val") if self.val_fraction else []

    def test_dataloader(self) -> Batches:
        """MNIST's test images in their own order."""
        return self._batches("test", "test")

    def predict_dataloader(self) -> Batches:
        """MNIST's test images in their own order."""
        return self.test_dataloader()

    def _batches(self, stage: str, part: str, **options: Any) -> Batches:
        # Lightning recommends worker processes, but these loaders have no work for them
        warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
        if part not in vars(self):
            self.setup(stage)
        images, y = getattr(self, part).tensors
        if self.trainer:
            images, y = (tensor.to(self.trainer.strategy.root_device) for tensor in (images, y))
            options["as_bytes"] = takes_bytes(self.trainer.lightning_module)
        return Batches(TensorDataset(images, y), self.batch_size, seed=self.seed, **options)


def takes_bytes(module: Any) -> bool:
    """Whether a module's pixels stay bytes.

    It has the two parameters of one `linear`, and its class says ``takes_bytes = True`` in its body: the methods
    defined there multiply bytes by `linear`, and divide the loss by `Batch.divisor`. A subclass that overrides one of
    them, without saying so, gets floats.
    """
    steps = ("logits", "forward", "training_step", "validation_step", "test_step", "predict_step")
    owners = [next((kind for kind in type(module).__mro__ if step in vars(kind)), object) for step in steps]
    says = all(vars(owner).get("takes_bytes", False) for owner in owners)
    return says and [W.dtype == torch.float32 and W.device.type != "mps" for W in module.parameters()] == [True, True]


def hold_out(y: Tensor, val_fraction: float, seed: int) -> Tensor:
    """Which rows are for validation, ``(N,)`` bool: a fraction of each label in `y`, ``(N, 1)``.

    If the fraction is not 0, at least one row of each label is held out and one is left.

    Raises:
        UserError: If that leaves too few rows of a label.
    """
    random = np.random.default_rng(seed)
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique() if val_fraction else []:
        rows = random.permutation((y.squeeze(1) == label).nonzero().squeeze(1).numpy())
        if len(rows) < 2:
            raise UserError(f"val_fraction={val_fraction} needs two training images of each digit; use 0.")
        held_out[rows[: min(max(round(len(rows) * val_fraction), 1), len(rows) - 1)]] = True
    return held_out
