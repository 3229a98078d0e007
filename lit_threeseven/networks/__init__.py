"""Other networks for the same data, `LitThreeSevenMLP` with hidden layers and `LitThreeSevenMany` at once; `load`."""

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
    """The network of a checkpoint, whichever it holds, in evaluation mode; never runs code that it may hold.

    Args:
        path: The checkpoint's file.
        *others: Classes of networks that it may hold besides `NETWORKS`.

    Raises:
        OSError: If the file can't be read.
        UserError: If it is no checkpoint of one of these classes, holds objects that could run code, or numbers that
            are not finite.
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
