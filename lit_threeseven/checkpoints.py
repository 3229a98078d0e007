"""Checkpoints that a run can go on from: written whole or not at all, kept up to date, found again and checked."""

import io
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_threeseven.errors import Stopped, UserError


class WholeCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, and move it there in one step when it is complete.

    Lightning's own way leads through the system's temporary folder, from where a file may have to be copied, and half
    a copy may be left.

    Example:
        >>> trainer = L.Trainer(plugins=[WholeCheckpointIO()])
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; until it is complete, what was there before stays.

        Args:
            checkpoint: What to write.
            path: The file.
            storage_options: Unused.

        Raises:
            UserError: If it can't be written.
        """
        content = io.BytesIO()  # torch.save into a file on a full disk does not say what was wrong
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside its place, and move it there in one step when it is complete and on the disk.

    Raises:
        UserError: If it can't be written; what was there before is then still there.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
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
        raise UserError(
            f"{path} could not be written ({error.strerror}); what was saved before is whole. Mend that, or choose "
            "another folder, and go on from there with --ckpt_path."
        ) from error


class BestCheckpoint(ModelCheckpoint):
    """Keep the state with the lowest validation loss in `best.ckpt`.

    A run that goes on in a folder that was moved or copied knows its best checkpoint there; one that goes on in a new
    folder begins to look for it anew.
    """

    def __init__(self) -> None:
        super().__init__(
            filename="best", monitor="val/loss", save_on_train_epoch_end=False, enable_version_counter=False
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, with the best one where it is now."""
        best = str(Path(self.dirpath, "best.ckpt"))
        if state_dict["best_model_path"] and Path(best).is_file():
            here = {"dirpath": self.dirpath, "best_model_path": best, "kth_best_model_path": best}
            super().load_state_dict(state_dict | here | {"best_k_models": {best: state_dict["best_model_score"]}})


class LastCheckpoint(ModelCheckpoint):
    """Keep the newest state in `last.ckpt`; on Ctrl-C or SIGTERM finish the epoch and save before the run stops.

    The state is that of the end of an epoch, validation included, and the curves up to there are on disk before it is
    written: a run that is killed at any moment and goes on from it ends where an uninterrupted one does. With several
    processes it is enough that one of them gets the signal. A second signal has its usual effect.

    Args:
        every_n_epochs: Epochs from one saving to the next.

    Raises:
        Stopped: In `Trainer.fit`, after a signal.

    Example:
        >>> trainer = L.Trainer(callbacks=[LastCheckpoint(every_n_epochs=10)], plugins=[WholeCheckpointIO()])
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        super().__init__(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
        self.period = every_n_epochs
        self._signal = 0
        self._handlers = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is taken up: the folder of the run says it all."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to the signals, in place of Lightning, which stops at once on one and in mid-air on the other."""
        super().on_train_start(trainer, pl_module)
        self._signal = 0
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, if it is time to or the run is to stop."""
        stop = bool(self._signal)
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop or (trainer.current_epoch + 1) % self.period == 0:
            for logger in trainer.loggers:
                logger.save()
            super().on_train_epoch_end(trainer, pl_module)
        if stop:
            raise Stopped(self._signal, trainer.current_epoch + 1, self.best_model_path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the signals to those who had them before."""
        super().on_train_end(trainer, pl_module)
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the signals to those who had them before."""
        super().on_exception(trainer, pl_module, exception)
        self._restore_handlers()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signal = signum
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


def find_checkpoint(ckpt_path: str, logs: Path) -> Path:
    """The file that `--ckpt_path` means.

    Args:
        ckpt_path: A path, or "best" or "last" for those of the newest run, which has the highest number.
        logs: Folder that holds the runs.

    Raises:
        UserError: If there is no such file.
    """
    if ckpt_path in ("best", "last"):
        runs = [path for path in logs.glob("version_*") if path.name[8:].isdigit()]
        if not runs:
            raise UserError(f"There is no run in {logs}; train first without --ckpt_path, or give a checkpoint's file.")
        found = max(runs, key=lambda path: int(path.name[8:])) / "checkpoints" / f"{ckpt_path}.ckpt"
        if not found.is_file():
            raise UserError(
                f"The newest run has not saved a {ckpt_path} checkpoint: {found} is not there. Begin it anew without "
                "--ckpt_path, or give the file of another one."
            )
        return found
    if not Path(ckpt_path).is_file():
        raise UserError(f"There is no checkpoint file {ckpt_path}; give a file, or best or last of the newest run.")
    return Path(ckpt_path).resolve()


def read_checkpoint(path: str | Path, digits: tuple[int, int]) -> dict[str, Any]:
    """Read a checkpoint of this network, without running any code that the file may contain.

    Args:
        path: Checkpoint file.
        digits: Digits of the data that it is going to meet.

    Raises:
        UserError: If it is damaged, holds another model, or was trained on other digits.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: tuple(weight.shape) for name, weight in checkpoint["state_dict"].items()}
        trained_on = checkpoint.get("hyper_parameters", {}).get("digits", digits)
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise UserError(
            f"{path} is no checkpoint of this program, or only a part of one ({type(error).__name__}); give another."
        ) from error
    expected = {"W": (784, 1), "b": (1,)}
    if weights != expected:
        raise UserError(f"{path} holds another model: {weights} instead of {expected}; give another checkpoint.")
    if list(trained_on) != list(digits):
        raise UserError(
            f"{path} was trained on the digits {list(trained_on)}, and the data are to be {list(digits)}; "
            f"give --data.digits '{list(trained_on)}' or another checkpoint."
        )
    return checkpoint


def check_recipe(path: str | Path, checkpoint: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Check that a checkpoint was made with a recipe.

    Args:
        path: Where the checkpoint came from.
        checkpoint: Its content. What it does not tell of itself is not compared: that of a Trainer of one's own has the
            arguments of model and data, and the optimizer's name, only.
        recipe: What is to be used: "model.lr", "data.seed", "optimizer.momentum" and the like.

    Raises:
        UserError: If the checkpoint was made with something else; it names what differs.
    """
    made_with = {
        f"{room}.{name}": value
        for room, entry in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters"))
        for name, value in checkpoint.get(entry, {}).items()
    }
    if "optimizer" in checkpoint:
        made_with["optimizer"] = checkpoint["optimizer"]
    made_with |= checkpoint.get("recipe", {})
    differing = [
        f"{name} {made_with[name]} instead of {value}"
        for name, value in recipe.items()
        if name in made_with and made_with[name] != value
    ]
    if differing:
        raise UserError(f"{path} was made with {', '.join(differing)}; give the same settings, or another checkpoint.")
