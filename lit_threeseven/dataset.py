"""Threes and sevens as tensors: find MNIST's files, check them, read them, keep two digits, label.

Two sources, one reader. ``bundled`` is a torchvision MNIST root with nothing but the threes and the sevens in it,
shipped inside this package; ``torchvision`` is a full MNIST root, downloaded if absent.
"""

import hashlib
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

Source = Literal["bundled", "torchvision"]

BUNDLED_ROOT = Path(__file__).parent / "bundled"
BUNDLED_DIGITS = (3, 7)

# The files of an MNIST root, with the SHA-256 sums of the bundled ones.
FILES = {
    "train-images-idx3-ubyte": "351d1ab6d8ecb678487a1d28afc7d907f7f4cc8b801bf424ab024462eb30a01a",
    "train-labels-idx1-ubyte": "389d50d809b3ddfe6d5530a3f5e54be9fa89b9e900cd1a549aac821c8f7a2b16",
    "t10k-images-idx3-ubyte": "420cc5b2b61884ce89e111ce939874a83c66b9e449976c1c010f5b8fedda1430",
    "t10k-labels-idx1-ubyte": "efc54e459887765a40208193c9a5fd5a9800756c9738c4b3f3368e931b9f9a39",
}

DOWNLOAD_TIMEOUT = 30  # seconds without an answer


def check_digits(digits: Sequence[int]) -> tuple[int, int]:
    """Two different digits from 0 to 9 as a tuple; raises ValueError for anything else."""
    if len(digits) != 2 or digits[0] == digits[1] or not set(digits) <= set(range(10)):
        raise ValueError(f"digits must be two different digits from 0 to 9, such as (3, 7), got {tuple(digits)}.")
    return digits[0], digits[1]


def raw_folder(root: str | Path) -> Path:
    """The folder inside an MNIST root in which torchvision keeps the four files; ``~`` is the home folder."""
    return Path(root).expanduser() / "MNIST" / "raw"


def prepare(source: Source, data_dir: str | Path) -> None:
    """Make sure that the data is there, downloading MNIST if it is absent.

    A download is complete and checked before any of it appears in ``data_dir``, so several processes may prepare the
    same folder at once, and an interrupted download leaves no partial file. The arguments are those of `load`.

    Raises:
        RuntimeError: If the files can't be downloaded, or arrive damaged.
    """
    raw = raw_folder(data_dir)
    if source == "torchvision" and not all((raw / name).exists() for name in FILES):
        _download(raw)


def load(source: Source, data_dir: str | Path, digits: tuple[int, int], train: bool) -> tuple[Tensor, Tensor]:
    """Read the images of two digits, in MNIST's own order.

    Args:
        source: ``"bundled"`` or ``"torchvision"``.
        data_dir: The torchvision MNIST root; unused for the bundled data.
        digits: Two digits, 0 to 9. The first gets label 1, the second label 0.
        train: True for the training set, False for the test set.

    Returns:
        Images ``(N, 28, 28)`` uint8, 0 to 255, and labels ``(N, 1)`` float32, 0 or 1.

    Raises:
        RuntimeError: If a file is missing or damaged, or there is no image of one of the digits.
    """
    root = BUNDLED_ROOT if source == "bundled" else data_dir
    images, targets = read(root, train)
    for digit in digits:
        if not (targets == digit).any():
            raise RuntimeError(f"{raw_folder(root)} has no image of the digit {digit}; choose other digits.")
    chosen = (targets == digits[0]) | (targets == digits[1])
    return images[chosen], (targets[chosen] == digits[0]).float().unsqueeze(1)


def read(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Read one part of an MNIST root, after checking that its files are whole.

    Args:
        root: Folder that holds ``MNIST/raw`` with MNIST's four files.
        train: True for the training set, False for the test set.

    Returns:
        Images ``(N, 28, 28)`` uint8, 0 to 255, and the digits that they show, ``(N,)`` int64, 0 to 9.

    Raises:
        RuntimeError: If a file is missing, truncated, not an MNIST file, or, in the bundled root, not the shipped one.
    """
    raw = raw_folder(root)
    part = "train" if train else "t10k"
    image_file, label_file = raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte"
    for path in (image_file, label_file):
        if reason := _damage(path):
            remedy = 'Delete it to download MNIST again, or use source="bundled".'
            if Path(root) == BUNDLED_ROOT:
                remedy = "Reinstall lit_threeseven."
            raise RuntimeError(f"{path} is not the MNIST file it should be: {reason}. {remedy}")
    images, targets = read_image_file(str(image_file)), read_label_file(str(label_file))
    if len(images) != len(targets) or targets.max() > 9:
        raise RuntimeError(
            f"{label_file} does not belong to {image_file.name}: it holds {len(targets)} labels up to {targets.max()}, "
            f"expected {len(images)} from 0 to 9. Delete both to download MNIST again."
        )
    return images, targets


def _damage(path: Path) -> str | None:
    """What is wrong with an IDX file (format: https://github.com/cvdfoundation/mnist), or None."""
    if not path.is_file():
        return "it is missing"
    sides = [28, 28] if "images" in path.name else []
    magic = 0x0800 + 1 + len(sides)  # unsigned bytes, and the number of dimensions
    header_format = f">{2 + len(sides)}I"
    header_size = struct.calcsize(header_format)
    with path.open("rb") as file:
        header = file.read(header_size)
        if len(header) < header_size:
            return f"it ends after {len(header)} bytes"
        found_magic, rows, *found_sides = struct.unpack(header_format, header)
        if (found_magic, found_sides) != (magic, sides) or rows == 0:
            return f"it begins with {header!r} instead of the header of an IDX file"
        expected = header_size + rows * (784 if sides else 1)
        if (size := os.fstat(file.fileno()).st_size) != expected:
            return f"it holds {size} bytes where its header announces {expected}"
        if path.is_relative_to(BUNDLED_ROOT):
            file.seek(0)
            if hashlib.sha256(file.read()).hexdigest() != FILES[path.name]:
                return "its SHA-256 sum differs"
    return None


def _download(raw: Path) -> None:
    """Fetch MNIST with torchvision into a folder beside its place, then move the four files there."""
    created = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=raw) as staging:
            staged = raw_folder(staging)
            staged.mkdir(parents=True)
            for archive in raw.glob("*-ubyte.gz"):
                shutil.copy(archive, staged)
            MNIST(staging, download=True)
            for train in (True, False):
                read(staging, train)
            for name in FILES:
                (staged / name).replace(raw / name)
    except Exception as error:  # whatever a mirror's answer leads to in urllib, gzip or torchvision
        for folder in created:
            with suppress(OSError):  # not empty: another process uses it
                folder.rmdir()
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise RuntimeError(
            f"MNIST could not be downloaded to {raw} ({reason}). Put its four files there yourself "
            f'({", ".join(FILES)}, or their .gz archives), or use source="bundled".'
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
