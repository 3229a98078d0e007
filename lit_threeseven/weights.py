"""Checkpoints, read without running code and written completely or not at all; and the networks that ship."""

import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from lit_threeseven.errors import UserError

PRETRAINED = Path(__file__).parent / "pretrained"
UNFINISHED = ".{}.unfinished"  # name of a file while it is written

# Entries that a run needs to resume, and entries in which a checkpoint may describe itself.
RESUMED = {"pytorch-lightning_version": str, "epoch": int, "global_step": int, "loops": dict, "callbacks": dict}
RESUMED |= {"optimizer_states": list, "lr_schedulers": list}
NOTED: dict[str, type] = dict.fromkeys(("hyper_parameters", "datamodule_hyper_parameters", "recipe"), dict)
NOTED |= {"optimizer": str, "network": str}


def read(path: str | Path | IO[bytes], map_location: Any = "cpu") -> dict[str, Any]:
    """Read a Lightning checkpoint without running any code.

    A pickle may name any function of any module, to be called during loading. Here only tensors, numbers, text, and
    containers of these are built.

    Args:
        path: A file's path, or an open file.
        map_location: Device of the tensors, as in `torch.load`.

    Raises:
        OSError: If the file can't be read.
        UserError: If it contains anything else, is not a checkpoint, or is truncated.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused anyway
            checkpoint: dict[str, Any] = torch.load(path, map_location, weights_only=True)
        dict(checkpoint["state_dict"])
    except OSError:
        raise
    except Exception as error:  # which one torch.load raises depends on the damage
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise UserError(f"{path} is refused: it holds {code[1]}, which could run code. None was run.") from error
        why = type(error).__name__
        raise UserError(f"{path} is not a lit-threeseven checkpoint, or is truncated ({why}).") from error
    for name, kind in (RESUMED | NOTED).items():
        if not isinstance(checkpoint.get(name, kind()), kind):
            raise UserError(f"{path} is damaged: its entry {name} is not of type {kind.__name__}.")
    for name in ("loops", "optimizer_states", "lr_schedulers"):
        entries = checkpoint.get(name, [])
        if not all(isinstance(entry, dict) for entry in (entries.values() if name == "loops" and entries else entries)):
            raise UserError(f"{path} is damaged: its entry {name} must contain only dictionaries.")
    return checkpoint


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside its final path, and move it there once it is on disk; after an OSError the old file stays."""
    unfinished = path.with_name(UNFINISHED.format(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
