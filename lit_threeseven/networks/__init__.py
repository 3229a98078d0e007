"""Other networks for the same data: `LitThreeSevenMLP` with hidden layers, and `LitThreeSevenMany` at once."""

from lit_threeseven.networks.layers import LitThreeSevenMLP
from lit_threeseven.networks.many import LitThreeSevenMany

__all__ = ["LitThreeSevenMLP", "LitThreeSevenMany"]
