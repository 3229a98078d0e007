"""`LitThreeSevenMLP`, with hidden layers; `LitThreeSevenMany`, many networks at once; and `load`, for checkpoints."""

from pathlib import Path

from lit_threeseven import LitThreeSeven
from lit_threeseven.errors import UserError
from lit_threeseven.networks.layers import LitThreeSevenMLP
from lit_threeseven.networks.many import LitThreeSevenMany
from lit_threeseven.resumable import saved
from lit_threeseven.weights import read

__all__ = ["NETWORKS", "LitThreeSevenMLP", "LitThreeSevenMany", "load"]

NETWORKS: tuple[type[LitThreeSeven], ...] = (LitThreeSeven, LitThreeSevenMLP)


def load(path: str | Path, *others: type[LitThreeSeven]) -> LitThreeSeven:
    """Load the network in a checkpoint, of any class in `NETWORKS`, in evaluation mode, without running any code in it.

    Args:
        path: The checkpoint's file.
        *others: More classes that the network may have.

    Raises:
        OSError: If the file can't be read.
        UserError: If it is not a checkpoint of one of these classes, or contains objects that could run code, or
            weights that are not finite.
    """
    checkpoint = read(path)
    network = next((network for network in (*others, *NETWORKS) if saved(network, checkpoint)), LitThreeSeven)
    try:
        model = network.load_from_checkpoint(path).eval()
    except Exception as error:  # the arguments in a damaged file may be anything
        raise UserError(f"{path} can't be used: {' '.join(str(error).split())}") from error
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"{path} holds weights that are not finite.")
    return model
