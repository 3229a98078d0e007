"""Tell handwritten threes from sevens with the smallest neural network: ``y = sigmoid(x W + b)``."""

from lit_threeseven.datamodule import ThreeSevenDataModule
from lit_threeseven.module import LitThreeSeven

__all__ = ["LitThreeSeven", "ThreeSevenDataModule"]
