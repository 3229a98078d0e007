"""What uses a trained network: pictures of one's own, and export."""

from lit_threeseven.use.pictures import NoInkError, normalize

__all__ = ["NoInkError", "normalize"]
