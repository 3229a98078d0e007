"""What runs the network: command line, checkpoints, processes. The network itself doesn't need it."""

from lit_threeseven.run.checkpoints import LastCheckpoint, WholeCheckpointIO
from lit_threeseven.signals import Stopped

__all__ = ["LastCheckpoint", "Stopped", "WholeCheckpointIO"]
