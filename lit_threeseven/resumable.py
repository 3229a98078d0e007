"""A network and data that any Trainer can save, load without running code, and resume."""

import atexit
import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Self

from lit_threeseven import __version__, sharing
from lit_threeseven.errors import DivergedError, UserError
from lit_threeseven.weights import PRETRAINED, read

# How checkpoints of earlier releases, and those that ship, name this package's networks.
SHORT = {"LitThreeSeven": "lit_threeseven.module.LitThreeSeven"}
SHORT |= {"LitThreeSevenMLP": "lit_threeseven.networks.layers.LitThreeSevenMLP"}


def plain(value: Any) -> Any:
    """A value that a checkpoint can store: numbers of numpy or torch become Python's, even within sequences."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Real) and not isinstance(value, int | float):
        return float(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return (list if isinstance(value, list) else tuple)(map(plain, value))
    return value


def arguments(kind: type, kept: dict[str, Any]) -> dict[str, Any]:
    """The arguments in a checkpoint that a class takes, without any name of code to call."""
    parameters = inspect.signature(kind).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {str(name): value for name, value in dict(kept).items()}
    return {name: value for name, value in named.items() if name in parameters or (takes_any and name[:1] != "_")}


def full_name(kind: type) -> str:
    """A class's module and name, as ``--model`` takes them: "nets.Shifted", even if nets.py is the running script."""
    module = kind.__module__
    if module in ("__main__", "__mp_main__"):
        main = sys.modules[module]
        module = main.__spec__.name if main.__spec__ else Path(getattr(main, "__file__", module)).stem
    return f"{module}.{kind.__qualname__}"


class PlainArguments(HyperparametersMixin):
    """Keeps its arguments so that a checkpoint can hold them, see `plain`, and shows them."""

    def __repr__(self) -> str:
        given = {name: value for name, value in self.hparams.items() if name[0] != "_"}
        rows = {part: len(vars(self)[part]) for part in ("train", "val", "test") if part in vars(self)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in (given | rows).items())})"

    def save_hyperparameters(self, *args: Any, **options: Any) -> None:
        """Keep the arguments of `__init__` as Lightning does, with plain numbers."""
        super().save_hyperparameters(*args, **options)
        self.hparams.update({name: plain(value) for name, value in self.hparams.items()})


class ResumableData(PlainArguments, L.LightningDataModule):
    """A `LightningDataModule` that is loaded from a checkpoint without running any code in the file."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Data with the arguments in a checkpoint; as `Resumable.load_from_checkpoint`."""
        checkpoint = read(checkpoint_path, map_location or "cpu")
        data = cls(**arguments(cls, checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})) | kwargs)
        if cls.__qualname__ in checkpoint:  # where Lightning puts the state of data
            data.load_state_dict(checkpoint[cls.__qualname__])
        return data


@atexit.register
def leave() -> None:
    """Leave the other processes: if gloo's threads outlive Python, they abort a program that has ended well."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def check_versions() -> None:
    """Raise a UserError, on each process, if they run different releases of this package: bits would differ."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    versions = [__version__] * distributed.get_world_size()
    distributed.all_gather_object(versions, __version__)
    for rank, other in enumerate(versions):
        if other != versions[0]:
            raise UserError(
                f"Process 0 runs lit_threeseven {versions[0]}, and process {rank} {other}; install one version on all "
                "machines."
            )


class Resumable(PlainArguments, L.LightningModule):
    """A `LightningModule` that any Trainer can save and resume, and that can be shared.

    Its checkpoints are loaded without running any code in the file, into a network of the class that saved them.
    Training resumes after the last batch trained, and non-finite weights are never saved.
    """

    __call__: Callable[..., torch.Tensor]  # torch says Any

    training_facts: dict[str, Any] = {}  # noqa: RUF012  # what a checkpoint says about its training, for a model card

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a network with the arguments and weights of a checkpoint, without running any code in the file.

        Args:
            checkpoint_path: A file's path, or an open file.
            map_location: Device of the network; None means the CPU.
            hparams_file: Unused: the arguments are those in the checkpoint.
            strict: Whether the weights must match the network's exactly, without missing or extra ones; None means as
                `strict_loading`.
            weights_only: Unused: nothing else is ever read.
            **kwargs: Arguments of the network in place of those in the checkpoint.

        Raises:
            OSError: If the file can't be read.
            UserError: If it is not a checkpoint, contains objects that could run code, or is of another network.
        """
        checkpoint = read(checkpoint_path, map_location or "cpu")
        check_class(cls, checkpoint)
        model = cls(**arguments(cls, checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})) | kwargs)
        model.strict_loading = model.strict_loading if strict is None else strict
        model.configure_model()
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"], model.strict_loading)
        model.training_facts = {"steps": checkpoint.get("global_step")} | checkpoint.get("recipe", {})
        return model.to(next(iter(checkpoint["state_dict"].values()), torch.empty(0)).device)

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None) -> Self:
        """A trained network, in evaluation mode, on the CPU.

        Args:
            folder: Folder that `save_pretrained` wrote; None means the network for threes and sevens that ships with
                the package, made by `scripts/pretrained.py`.

        Raises:
            OSError: If a file can't be read.
            UserError: If no network of this class ships, or the one in the folder is damaged or of another class.
        """
        if folder is None:
            path = PRETRAINED / f"{cls.__name__}.ckpt"
            if not path.is_file():
                raise UserError(f"No trained {cls.__name__} ships with this package; train one.")
            return cls.load_from_checkpoint(path).eval()
        state, config = sharing.read(Path(folder))
        check_class(cls, config)
        model = cls(**arguments(cls, config))
        check_weights(model, config | {"state_dict": state})
        model.load_state_dict(state)
        if not all(weight.isfinite().all() for weight in state.values()):
            raise UserError(f"{folder} holds weights that are not finite.")
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the network to a folder that can be shared.

        The folder gets the weights, `model.safetensors`; the arguments, `config.json`, both as Hugging Face's
        `PyTorchModelHubMixin` reads them; and a model card, `README.md`, with what is known about the training.

        Args:
            folder: Created if it doesn't exist. Files in it are replaced.

        Raises:
            OSError: If a file can't be written.
        """
        facts = {"digest of the weights": self.digest()} | self.training_facts
        if self._trainer:
            metrics = {name: f"{value:.4f}" for name, value in self.trainer.callback_metrics.items()}
            data = getattr(getattr(self.trainer, "datamodule", None), "hparams", {})
            facts |= {f"data.{name}": value for name, value in data.items()}
            facts |= {"steps": self.global_step} | metrics
        given = {name: value for name, value in self.hparams.items() if name[0] != "_"}
        facts |= {f"model.{name}": value for name, value in given.items()}
        config = {"network": full_name(type(self))} | given
        facts = {name: value for name, value in facts.items() if value is not None}
        sharing.write(Path(folder), self.state_dict(), config, facts)

    def configure_callbacks(self) -> list[L.Callback]:
        """Replace Lightning's model summary, if the Trainer has one, by `ParameterSummary`."""
        callbacks = vars(self.trainer)["callbacks"]
        usual = ModelSummary, RichModelSummary
        callbacks[:] = [ParameterSummary() if type(callback) in usual else callback for callback in callbacks]
        return []

    def setup(self, stage: str) -> None:
        """Before a fit, check that all processes run the same version, see `check_versions`."""
        if stage == "fit":
            check_versions()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save non-finite weights, and note the network's class and the optimizer's name."""
        self.check_finite()
        note(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another network's weights; resume after the last batch trained, and count the epochs."""
        check_weights(self, checkpoint)
        mend(checkpoint, self._trainer.max_steps if self._trainer else -1)

    def on_train_start(self) -> None:
        """Leave gradients as they are if they are exact: those of the two parameters of one `linear` of bytes."""
        exact = getattr(self.trainer.train_dataloader, "as_bytes", False) and len([*self.parameters()]) == 2
        if exact and isinstance(self.trainer.strategy.model, DistributedDataParallel):
            # `linear` has already summed the gradients; DDP would divide them, and (3 g) / 3 may not be g
            self.trainer.strategy.model.register_comm_hook(None, noop_hook)

    def on_train_end(self) -> None:
        """Refuse to end training with non-finite weights."""
        self.check_finite()

    def check_finite(self) -> None:
        """Raise a DivergedError, which names the learning rate, if a weight is not finite.

        A non-finite loss leaves such weights behind; unlike the loss, these are the same on every process.
        """
        if not all(parameter.isfinite().all() for parameter in self.parameters()):
            lr = [group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
            raise DivergedError(
                f"The loss became non-finite within {self.global_step} steps at learning rate {lr[0] if lr else '?'}; "
                "choose a smaller one, or smaller starting weights."
            )

    def digest(self) -> str:
        """The `digest` of the parameters: the same digest means the same bits."""
        return digest(self)


class ParameterSummary(ModelSummary):
    """Lists a network's parameters, `W` and `b`, which Lightning's own summary counts as "other params"."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table."""
        parameters = [*pl_module.named_parameters()]
        if trainer.is_global_zero:
            print(f"{'Parameter':<12} {'Shape':<12} {'Numbers':>9}")
            for name, parameter in parameters:
                frozen = "" if parameter.requires_grad else "  frozen"
                print(f"{name:<12} {tuple(parameter.shape)!s:<12} {parameter.numel():>9,}{frozen}")
            print(f"{'in all':<25} {sum(parameter.numel() for _, parameter in parameters):>9,}")


def saved(kind: type, checkpoint: dict[str, Any]) -> bool:
    """Whether a network of exactly this class saved a checkpoint; True if the checkpoint doesn't say."""
    name = str(checkpoint.get("network", kind.__name__))
    return SHORT.get(name, name) in (full_name(kind), kind.__name__) or "network" not in checkpoint


def check_class(kind: type, checkpoint: dict[str, Any]) -> None:
    """Raise a UserError, which names both classes, if another class saved a checkpoint."""
    if not saved(kind, checkpoint):
        name = SHORT.get(str(checkpoint["network"]), checkpoint["network"])
        raise UserError(
            f"The checkpoint is of {name}, not {full_name(kind)}; use that class, on the command line with --model "
            f"{name}."
        )


def check_weights(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Raise a UserError, which names both networks, if a checkpoint is of another class or has other shapes."""
    check_class(type(module), checkpoint)
    states = checkpoint["state_dict"], module.state_dict()
    shapes = [{name: weight.shape for name, weight in state.items()} for state in states]
    if module.strict_loading and shapes[0] != shapes[1]:
        found, own = (", ".join(f"{name} {tuple(shape)}" for name, shape in state.items()) for state in shapes)
        raise UserError(f"The checkpoint holds a network with {found}, not {type(module).__name__} with {own}.")


def note(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Note a network's class and the optimizer's name in its checkpoint."""
    checkpoint["network"] = full_name(type(module))
    checkpoint["optimizer"] = ", ".join(type(optimizer).__name__ for optimizer in module.trainer.optimizers)


def mend(checkpoint: dict[str, Any], max_steps: int = -1) -> None:
    """Change a checkpoint so that Lightning resumes after the last batch trained, and counts the epochs.

    If `max_steps` ended a run within an epoch, Lightning resumes with the next epoch. It also counts a batch or an
    epoch that was only begun as trained.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    if not {"epoch_progress", "epoch_loop.batch_progress"} <= loops.keys():
        return
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    trained, done = batches["current"]["processed"], epochs["current"]["processed"]
    running, begun = epochs["current"]["started"] > done, batches["current"]["ready"] > trained
    last = batches["is_last_batch"] and not begun  # `is_last_batch` is set when a batch begins, before it is trained
    if begun:
        batches["is_last_batch"] = False
        _level(batches)
        for state in loops["state_dict"].get("combined_loader", []):
            state |= {"seen": trained} if "seen" in state else {}  # of this package's loaders
    if not trained or (last and not running):  # between two epochs
        batches |= {"current": dict.fromkeys(batches["current"], 0), "is_last_batch": False}
        _level(epochs)
    elif (
        0 <= max_steps <= checkpoint["global_step"]
    ):  # nothing is left to do, and Lightning counts the unfinished epoch
        _level(epochs, int(running))
    elif not running:  # cut off
        for counts in (epochs["current"], epochs["total"]):
            counts["processed"] = counts["completed"] = counts["processed"] - 1


def digest(module: torch.nn.Module) -> str:
    """SHA-256 of the parameters as little-endian float32, in hexadecimal: the same digest means the same bits."""
    numbers = torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).cpu().float().numpy()
    return hashlib.sha256(numbers.astype("<f4").tobytes()).hexdigest()


def _level(progress: dict[str, Any], more: int = 0) -> None:
    # Set all counts of a loop to the number processed.
    for counts in (progress["current"], progress["total"]):
        counts |= dict.fromkeys(counts, counts["processed"] + more)
