"""A progress bar at the terminal, and pictures in TensorBoard."""

from lit_threeseven.watch.bar import FitProgressBar
from lit_threeseven.watch.pictures import TensorBoardPictures

__all__ = ["FitProgressBar", "TensorBoardPictures"]
