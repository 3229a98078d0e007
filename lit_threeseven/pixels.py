"""How bytes become numbers."""

import torch
from torch import Tensor


def scale(pixels: Tensor) -> Tensor:
    """Convert bytes, 0 to 255, of any shape to float32 in [0, 1]; floats stay as they are."""
    return pixels / 255 if pixels.dtype == torch.uint8 else pixels


def flatten(images: Tensor) -> Tensor:
    """Turn bytes into the network's input: one row per image, every pixel divided by 255.

    Args:
        images: ``(N, 28, 28)`` or ``(N, 784)`` uint8, 0 to 255.

    Returns:
        ``(N, 784)`` float32 in [0, 1].
    """
    return scale(images.flatten(1))
