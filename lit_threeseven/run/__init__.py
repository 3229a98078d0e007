"""What runs the network: command line, checkpoints, processes. The network itself doesn't need it."""

from lit_threeseven.run.checkpoints import LastCheckpoint, Stopped, WholeCheckpointIO

__all__ = ["LastCheckpoint", "Stopped", "WholeCheckpointIO"]
