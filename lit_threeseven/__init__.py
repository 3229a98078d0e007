"""Tell handwritten threes from sevens with the smallest neural network: ``y = sigmoid(x W + b)``."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__all__ = ["LitThreeSeven", "ThreeSevenDataModule", "__version__"]
__version__ = version("lit_threeseven")

if TYPE_CHECKING:
    from lit_threeseven.datamodule import ThreeSevenDataModule
    from lit_threeseven.module import LitThreeSeven


def __getattr__(name: str) -> Any:
    """Import a class, and torch with it, only when it is used, so that Ctrl-C can stop the command until then."""
    homes = {"LitThreeSeven": "lit_threeseven.module", "ThreeSevenDataModule": "lit_threeseven.datamodule"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(homes[name]), name)
