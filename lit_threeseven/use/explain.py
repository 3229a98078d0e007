"""Why a network decides as it does: what each pixel contributes, and figures that show it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_threeseven.errors import UserError
from lit_threeseven.use.files import EXPLAINED
from lit_threeseven.use.find import Box, Found
from lit_threeseven.use.pictures import colours, formats
from lit_threeseven.watch import figures


def contributions(model: Any, x: Tensor) -> Tensor:
    """What each pixel contributes to the decision: the terms of ``x W``, above 0 for the first digit.

    With hidden layers it is the pixel times the slope of the logit there; with one layer, that is the term of ``x W``.

    Args:
        model: A `LitThreeSeven`, or anything with its `logits`.
        x: ``(N, 28, 28)``, 0 to 1.

    Returns:
        ``(N, 28, 28)``.
    """
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.logits(x).sum(), x)
    return (x * slope).detach()


def picture(file: str, found: Found) -> tuple[NDArray[np.uint8], Box]:
    """A file's picture, ``(H, W, 3)``, small enough for a figure, and the box in which the digit was found."""
    with Image.open(file, formats=formats()) as opened:
        values, scale = colours(opened)
    left, top, right, bottom = (round(side / scale) for side in found.box)
    return values.astype(np.uint8), (left, top, right, bottom)


class Explanations:
    """Figures in a folder, one for each picture and named after it; none overwrites a picture or another figure.

    Args:
        folder: Where to write them; created if it doesn't exist.
        files: The pictures.

    Raises:
        UserError: If the folder can't be written to.
    """

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.taken = folder.resolve(), {Path(file).resolve() for file in files}
        with self._naming_the_option():
            folder.mkdir(parents=True, exist_ok=True)

    def save(self, model: Any, file: str, found: Found, title: str) -> None:
        """Write the figure of what was found in a file; raise a UserError if that fails."""
        stem = os.fsdecode(os.fsencode(Path(file).name)[:200])  # a name has at most 255 bytes
        path, number = self.folder / f"{stem}{EXPLAINED}", 2
        while path in self.taken:
            path, number = self.folder / f"{stem} {number}{EXPLAINED}", number + 1
        self.taken.add(path)
        parts = contributions(model, found.image.unsqueeze(0))[0]
        with self._naming_the_option():
            b = model.b.item() if hasattr(model, "b") else None  # hidden layers have several
            figures.contributions(found.image, parts, title, model.digits, b, *picture(file, found)).savefig(path)

    @contextmanager
    def _naming_the_option(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"--explain {self.folder} can't be written to ({error.strerror or error}).") from error
