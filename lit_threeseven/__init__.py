"""Tell handwritten threes from sevens with the smallest neural network: ``y = sigmoid(x W + b)``."""

from typing import TYPE_CHECKING, Any

__all__ = ["LitThreeSeven", "ThreeSevenDataModule"]

if TYPE_CHECKING:
    from lit_threeseven.datamodule import ThreeSevenDataModule
    from lit_threeseven.module import LitThreeSeven
else:

    def __getattr__(name: str) -> Any:
        """Import both classes, and torch with them, when one is asked for: until then the command can be stopped."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from lit_threeseven.datamodule import ThreeSevenDataModule
        from lit_threeseven.module import LitThreeSeven

        return {"LitThreeSeven": LitThreeSeven, "ThreeSevenDataModule": ThreeSevenDataModule}[name]
