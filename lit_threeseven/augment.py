"""Small random rotations, zooms and shifts of training images, so that a large network can't learn them by heart.

It does what torchvision's ``v2.RandomAffine`` does to one image to a batch of them, each with its own numbers, in a
thirtieth of the time. The numbers are given by the caller, so they don't depend on how a batch is shared out.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from lit_threeseven.errors import UserError


@dataclass(frozen=True)
class Affine:
    """Rotate, zoom and shift each image of a batch, up to the limits; areas from outside the image are black.

    Attributes:
        rotation: Degrees, 0 to 180.
        zoom: Fraction by which width and height may grow or shrink, each on its own, from 0 to less than 1.
        shift: Pixels, 0 to 28, in both directions.

    Raises:
        UserError: If a limit is out of its range.
    """

    rotation: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("rotation", 180), ("zoom", 0.99), ("shift", 28)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"{name} must be from 0 to {most}, got {getattr(self, name)}.")

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return bool(self.rotation or self.zoom or self.shift)

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Change images.

        Args:
            images: ``(N, 28, 28)`` uint8.
            numbers: ``(N, 5)``, -1 to 1: how much of `rotation`, of `zoom` in width and height, and of `shift` to the
                right and down.

        Returns:
            ``(N, 28, 28)`` uint8, on the device of `images`.
        """
        if not len(images):  # a share may be empty
            return images
        angle, *zooms, right, down = numbers.to(images.device, torch.float32).unbind(1)
        angle = angle * math.radians(self.rotation)
        width, height = (1 + self.zoom * zoom for zoom in zooms)
        # affine_grid asks where a pixel of the new image comes from, so this is the inverse; its unit is half an image
        right, down = (part * (self.shift / 14) for part in (right, down))
        cos, sin = angle.cos(), angle.sin()
        rows = [cos / width, sin / width, -(cos * right + sin * down) / width]
        rows += [-sin / height, cos / height, (sin * right - cos * down) / height]
        places = affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [len(images), 1, 28, 28], align_corners=False)
        changed = grid_sample(images.unsqueeze(1).float(), places, align_corners=False)
        return changed.round_().byte().squeeze(1)
