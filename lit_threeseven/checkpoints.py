"""Saving, for any Trainer: checkpoints that are always complete, `best.ckpt` and `last.ckpt`, a save on a signal."""

import io
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lit_threeseven import weights
from lit_threeseven.resumable import Resumable, mend, note
from lit_threeseven.signals import Stopped, take


class WholeCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its final path, and move it there in one step when complete; load it as `weights.read`.

    Lightning itself writes to the system's temporary folder first; a crash may leave half a copy of that file. Use it
    as a plugin: ``Trainer(plugins=[WholeCheckpointIO()])``.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()  # on a full disk torch.save into a file doesn't say what went wrong
        torch.save(checkpoint, content)
        weights.write_whole(Path(path), content.getbuffer())

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return weights.read(path, map_location)


class BestCheckpoint(ModelCheckpoint):
    """Keep the state with the lowest validation loss in `best.ckpt`; without `dirpath` Lightning chooses its folder.

    A resumed run finds its best checkpoint even in a moved or copied folder; in a new folder the search starts over.
    """

    def __init__(self, dirpath: Path | None = None) -> None:
        super().__init__(dirpath, "best", "val/loss", save_on_train_epoch_end=False, enable_version_counter=False)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the state if it is the best so far, and the network logs "val/loss"."""
        if str(self.monitor) in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = str(Path(str(self.dirpath), "best.ckpt"))
        if state_dict["best_model_path"] and Path(best).is_file():
            here = {"dirpath": self.dirpath, "best_model_path": best, "kth_best_model_path": best}
            super().load_state_dict(state_dict | here | {"best_k_models": {best: state_dict["best_model_score"]}})


class LastCheckpoint(ModelCheckpoint):
    """Keep the newest state in `last.ckpt`; on Ctrl-C or SIGTERM finish the epoch, save, and raise `Stopped`.

    The state is that of the end of an epoch, validation included, and the curves up to there are on disk before it is
    written: a run that is killed at any moment and resumed ends where an uninterrupted one does. With several
    processes, a signal to one of them is enough: all of them check for it at the end of an epoch: at each save, and
    otherwise at most once in the Trainer's `log_every_n_steps` steps. A second signal stops at once.

    Args:
        every_n_epochs: Epochs from one save to the next; None means after each validation.
        dirpath: Folder of `last.ckpt`; None lets Lightning choose it.

    Example:
        >>> trainer = L.Trainer(callbacks=[LastCheckpoint(every_n_epochs=10)], plugins=[WholeCheckpointIO()])
    """

    def __init__(self, every_n_epochs: int | None = 1, dirpath: Path | None = None) -> None:
        super().__init__(dirpath, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        self.period, self._validated = every_n_epochs, False
        self._signal = self._asked = 0  # the signal that came, and the step when all processes were last asked for one

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the saved state: the run's folder decides."""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals from Lightning, which stops at once or mid-epoch; its teardown gives them back."""
        super().on_train_start(trainer, pl_module)
        self._signal, self._asked = 0, trainer.global_step
        if threading.current_thread() is threading.main_thread():
            take(self._note)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save if a save is due or the run has to stop."""
        due = (trainer.current_epoch + 1) % self.period == 0 if self.period else self._validated
        self._validated, stop = False, bool(self._signal)
        if trainer.world_size > 1:  # ask the others rarely: all of them, and their devices, wait for the answer
            every: int = vars(trainer)["log_every_n_steps"]
            ask = due or trainer.global_step - self._asked >= max(1, every)
            stop = ask and trainer.strategy.reduce_boolean_decision(stop, all=False)
            self._asked = trainer.global_step if ask else self._asked
        if stop or due:
            for logger in trainer.loggers:
                logger.save()
            super().on_train_epoch_end(trainer, pl_module)
        if stop:
            raise Stopped(self._signal, trainer.current_epoch + 1, self.best_model_path)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that a validation has ended."""
        self._validated = True

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """After a signal, an error of a collective operation means that the other processes have stopped already."""
        if self._signal and trainer.world_size > 1 and isinstance(exception, RuntimeError):
            raise Stopped(self._signal) from exception
        self._signal = self._signal or signal.SIGTERM  # the next signal stops at once

    def _note(self, signum: int, frame: Any) -> None:
        if self._signal:
            raise Stopped(signum)
        self._signal = signum


class Notes(L.Callback):
    """Note a run's recipe in its checkpoints; and do for any other network what a `Resumable` does for itself.

    Args:
        recipe: The settings that decide the weights after each step.
        given: The network's arguments, as in YAML.
    """

    def __init__(self, recipe: dict[str, Any], given: dict[str, Any]) -> None:
        self.recipe, self.given = recipe, given

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the recipe; of another network the class, the optimizer and the arguments."""
        checkpoint["recipe"] = self.recipe
        if not isinstance(pl_module, Resumable):
            note(pl_module, checkpoint)
            checkpoint["hyper_parameters"] = self.given

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume another network after the last batch trained."""
        if not isinstance(pl_module, Resumable):
            mend(checkpoint, trainer.max_steps)
