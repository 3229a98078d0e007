"""Uses of a trained network: your own pictures, and export."""

from lit_threeseven.use.pictures import NoInkError, normalize

__all__ = ["NoInkError", "normalize"]
