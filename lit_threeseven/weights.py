"""Weights and files: read without running code that a file may hold, checked; and the trained networks that ship."""

import hashlib
import io
import re
import warnings
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from typing_extensions import Self

PRETRAINED = Path(__file__).parent / "pretrained"


def read(path: str | Path | IO[bytes], map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint of Lightning's without running any code.

    A pickle may name any function of any module, which is called while it is loaded. Here nothing is built but tensors,
    numbers, texts, and containers of them.

    Args:
        path: A file's path, or an open file.
        map_location: Device of the tensors, as in `torch.load`.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it holds anything else, is no checkpoint, or is truncated.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused anyway
            checkpoint = torch.load(path, map_location, weights_only=True)
        dict(checkpoint["state_dict"])
    except OSError:
        raise
    except Exception as error:  # which one torch.load raises depends on the damage
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ValueError(f"{path} is refused: it holds {code[1]}, which could run code. None was run.") from error
        why = type(error).__name__
        raise ValueError(f"{path} is not a lit-threeseven checkpoint, or is truncated ({why}).") from error
    return checkpoint


def _harmless(checkpoint: dict[str, Any], entry: str) -> IO[bytes]:
    """What Lightning needs of a checkpoint: it would import and call a function that other entries name."""
    kept = {key: checkpoint[key] for key in ("state_dict", "network", "pytorch-lightning_version") if key in checkpoint}
    named = dict(checkpoint.get(entry, {})).items()
    arguments = {entry: {name: value for name, value in named if not str(name).startswith("_")}}
    content = io.BytesIO()
    torch.save({"pytorch-lightning_version": L.__version__} | kept | arguments, content)
    content.seek(0)
    return content


class DataFromFile(L.LightningDataModule):
    """A `LightningDataModule` that is loaded from a checkpoint without running any code that the file may hold."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Self:
        """Data with the arguments in a checkpoint; as `WeightsFromFile.load_from_checkpoint`."""
        content = _harmless(read(checkpoint_path, map_location or "cpu"), "datamodule_hyper_parameters")
        kwargs["weights_only"] = True
        return super().load_from_checkpoint(content, map_location or "cpu", *args, **kwargs)


class WeightsFromFile(L.LightningModule):
    """A `LightningModule` that is loaded from a file without running any code that the file may hold."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Self:
        """A network with the arguments and the weights of a checkpoint; never runs code that it may hold.

        Args:
            checkpoint_path: A file's path, or an open file.
            map_location: Device of the network; None means the CPU.
            *args: As in `lightning.LightningModule.load_from_checkpoint`.
            **kwargs: As there, and arguments of the network in place of those in the checkpoint.

        Raises:
            OSError: If the file can't be read.
            ValueError: If it is no checkpoint, holds objects that could run code, or another network.
        """
        content = _harmless(read(checkpoint_path, map_location or "cpu"), "hyper_parameters")
        kwargs["weights_only"] = True
        return super().load_from_checkpoint(content, map_location or "cpu", *args, **kwargs)

    @classmethod
    def from_pretrained(cls) -> Self:
        """The trained network that ships with the package, for threes and sevens.

        `scripts/pretrained.py` made it. It is in evaluation mode, on the CPU.

        Raises:
            ValueError: If none of this class ships.
        """
        path = PRETRAINED / f"{cls.__name__}.ckpt"
        if not path.is_file():
            raise ValueError(f"No trained {cls.__name__} ships with this package; train one.")
        return cls.load_from_checkpoint(path).eval()

    def check_weights(self, checkpoint: dict[str, Any]) -> None:
        """Raise a ValueError, which names both networks, if a checkpoint's weights are not this one's."""
        states = checkpoint["state_dict"], self.state_dict()
        found, own = (", ".join(f"{name} {tuple(w.shape)}" for name, w in state.items()) for state in states)
        if found != own:
            network = checkpoint.get("network", "another network")
            raise ValueError(f"The checkpoint holds {network} with {found}, not {type(self).__name__} with {own}.")

    def digest(self) -> str:
        """SHA-256 of the parameters as little-endian float32, in hexadecimal: the same digest means the same bits."""
        numbers = torch.cat([parameter.detach().flatten() for parameter in self.parameters()]).cpu().numpy()
        return hashlib.sha256(numbers.astype("<f4").tobytes()).hexdigest()

    def check_finite(self) -> None:
        """Interim."""
