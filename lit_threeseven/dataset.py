"""Threes and sevens as tensors: find the files of an MNIST root, as torchvision has it, check and read them, label."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lit_threeseven.errors import UserError

BUNDLED_ROOT = Path(__file__).parent / "bundled"  # only the threes and sevens
BUNDLED_DIGITS = (3, 7)

# The files of an MNIST root, images before labels, training before test, with the SHA-256 sums of the bundled ones.
FILES = {
    "train-images-idx3-ubyte": "351d1ab6d8ecb678487a1d28afc7d907f7f4cc8b801bf424ab024462eb30a01a",
    "train-labels-idx1-ubyte": "389d50d809b3ddfe6d5530a3f5e54be9fa89b9e900cd1a549aac821c8f7a2b16",
    "t10k-images-idx3-ubyte": "420cc5b2b61884ce89e111ce939874a83c66b9e449976c1c010f5b8fedda1430",
    "t10k-labels-idx1-ubyte": "efc54e459887765a40208193c9a5fd5a9800756c9738c4b3f3368e931b9f9a39",
}


def check_digits(digits: Sequence[int]) -> tuple[int, int]:
    """Return two different digits from 0 to 9 as a tuple; raise a UserError for anything else."""
    if len(digits) != 2 or digits[0] == digits[1] or not set(digits) <= set(range(10)):
        raise UserError(f"digits must be two different digits from 0 to 9, such as (3, 7), got {tuple(digits)}.")
    return int(digits[0]), int(digits[1])


def raw_folder(root: str | Path) -> Path:
    """The folder inside an MNIST root where torchvision keeps the four files; ``~`` is the home folder."""
    return Path(root).expanduser() / "MNIST" / "raw"


def load(root: str | Path, digits: tuple[int, int], train: bool) -> tuple[Tensor, Tensor]:
    """Read the images of two digits, in MNIST's own order.

    Args:
        root: Folder that contains ``MNIST/raw`` with MNIST's four files.
        digits: Two digits, 0 to 9. The first gets label 1, the second label 0.
        train: True for the training set, False for the test set.

    Returns:
        Images ``(N, 28, 28)`` uint8, 0 to 255, and labels ``(N, 1)`` float32, 0 or 1.

    Raises:
        UserError: If a file is missing or damaged, or there is no image of one of the digits.
    """
    images, targets = read(root, train)
    for digit in digits:
        if not (targets == digit).any():
            raise UserError(f"{raw_folder(root)} has no image of the digit {digit}; choose other digits.")
    chosen = (targets == digits[0]) | (targets == digits[1])
    return images[chosen], (targets[chosen] == digits[0]).float().unsqueeze(1)


def read(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read the training or test set of an MNIST root, after checking that its files are intact; arguments as in `load`.

    Returns:
        Images ``(N, 28, 28)`` uint8, 0 to 255, and the digits that they show, ``(N,)`` int64, 0 to 9.

    Raises:
        UserError: If a file is missing, truncated, not an MNIST file, or, in the bundled root, not the original one.
    """
    from torchvision.datasets.mnist import read_image_file, read_label_file  # half a second

    bundled, names = Path(root) == BUNDLED_ROOT, list(FILES)[:2] if train else list(FILES)[2:]
    remedy = "Reinstall lit_threeseven." if bundled else 'Delete it to download MNIST again, or use source="bundled".'
    contents = []
    for name, reader in zip(names, (read_image_file, read_label_file), strict=True):
        path = raw_folder(root) / name
        try:
            if bundled and hashlib.sha256(path.read_bytes()).hexdigest() != FILES[name]:
                raise ValueError("its SHA-256 sum differs")
            contents.append(reader(str(path)))
        except Exception as error:  # which one torchvision raises depends on the damage
            why = str(error) or type(error).__name__
            raise UserError(f"{path} is not an intact MNIST file ({why}). {remedy}") from error
    images, targets = contents
    if images.shape[1:] != (28, 28) or len(images) != len(targets) or targets.max() > 9:
        raise UserError(
            f"{path} has {len(targets)} labels up to {targets.max()}, {names[0]} has shape {tuple(images.shape)}; "
            f"expected 28 × 28 pixels and a label from 0 to 9 for each image. {remedy}"
        )
    return images, targets
