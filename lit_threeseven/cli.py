"""The command line: `LightningCLI` with the defaults of the main job, and errors told in a sentence."""

import csv
import errno
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed

from lit_threeseven.callbacks import FitProgressBar, TensorBoardPictures
from lit_threeseven.checkpoints import (
    LastCheckpoint,
    WholeCheckpointIO,
    check_recipe,
    find_checkpoint,
    read_checkpoint,
)
from lit_threeseven.datamodule import ThreeSevenDataModule
from lit_threeseven.errors import Stopped, UserError
from lit_threeseven.module import LitThreeSeven

DESCRIPTION = """
Learn to tell handwritten threes from sevens. Without a subcommand this is the main job: fit, then test, then a short
table; its options are those of fit, see `fit --help`.
"""

HELP = {
    "fit": "Train, with checkpoints and TensorBoard curves.",
    "validate": "Measure a checkpoint on the held-out training images.",
    "test": "Measure a checkpoint on the test images.",
    "predict": "Write what a checkpoint makes of each test image to a CSV file beside it.",
    "seed_everything": "Seed of the starting W and b; true draws one at random.",
    "trainer.check_val_every_n_epoch": "Epochs from one validation, and one saved checkpoint, to the next. Left alone, "
    "there are 20 over the whole fit, or one per epoch if it is shorter.",
    "trainer.logger": "Where curves go. Left alone, fit writes a TensorBoard run to logs/version_N, and the other "
    "subcommands write none; false switches it off.",
    "trainer.default_root_dir": "Folder that the folder logs is put into. Left alone, the current one.",
    "ckpt_path": "Checkpoint to go on from: a file, or best or last for that of the newest run.",
}

# File in the folder of a run that says which torchrun job it belongs to.
MARKER = ".torchrun"

# What the system says of a full or damaged disk, and what of a process that is not there (any more).
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
LOST = re.compile("gloo|nccl", re.IGNORECASE)

# How long a process waits for another one.
PATIENCE = timedelta(minutes=2)

# Validations, and saved checkpoints, of a whole fit where `check_val_every_n_epoch` is not given.
CHECKS_PER_FIT = 20


class EndTogether(Callback):
    """Begin and end with the other processes of a run.

    This process gives up if they have not all come after a while, which gloo alone does not always do. When it fails it
    ends those that Lightning has started: they may be waiting for it.
    """

    def __init__(self) -> None:
        self._watch = threading.Timer(1.5 * PATIENCE.total_seconds(), self._give_up)
        self._watch.daemon = True
        self._watch.start()

    def setup(self, trainer: Trainer, pl_module: LitThreeSeven, stage: str) -> None:
        """They are all there."""
        self._watch.cancel()

    def on_exception(self, trainer: Trainer, pl_module: LitThreeSeven, exception: BaseException) -> None:
        """End them."""
        if trainer.strategy.launcher and not isinstance(exception, Stopped):
            trainer.strategy.launcher.kill(signal.SIGTERM)

    @staticmethod
    def _give_up() -> None:
        if not local_rank():
            print(f"lit-threeseven: error: {lost('no answer')}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread is deep inside torch


class ThreeSevenCLI(LightningCLI):
    """`LightningCLI` for this network and this data.

    Args:
        args: Command line without the program's name. Without a subcommand it is the main job: fit, then test.
    """

    def __init__(self, args: list[str]) -> None:
        self.main_job = not args or (args[0].startswith("-") and args[0] not in ("-h", "--help"))
        self.ckpt_path, self.run, self.start_step = None, None, 0
        super().__init__(
            LitThreeSeven,
            ThreeSevenDataModule,
            trainer_defaults={
                "max_epochs": 2000,
                "log_every_n_steps": 20,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"description": DESCRIPTION},
            args=["fit", *args] if self.main_job else args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, and the arguments of the Trainer's methods that are not the user's to give."""
        own = {"ckpt_path", "weights_only", "verbose", "return_predictions"}
        return {name: skipped | own for name, skipped in LightningCLI.subcommands().items()}

    def setup_parser(self, *args: Any) -> None:
        """Build the parsers, and say in plain words what Lightning's help says otherwise."""
        super().setup_parser(*args)
        subcommands = self.parser._subcommands_action._choices_actions
        for action in (
            *subcommands,
            *(a for parser in self._subcommand_parsers.values() for a in parser._actions),
        ):
            action.help = HELP.get(action.dest, action.help)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises its errors instead of printing its usage."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The checkpoint; and the digits, which the network has from the data."""
        parser.add_argument("--ckpt_path", type=str | None)
        parser.link_arguments("data.digits", "model.digits")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse, then find and check the checkpoint before anything is built or written."""
        self.config = parser.parse_args(args)
        options = self.config[self.config.subcommand]
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun has restarted this program
            self.run = meet_again(log_folder(options.trainer))
        if self.run and (last := self.run / "checkpoints" / "last.ckpt").is_file():
            self.ckpt_path = str(last)
        elif options.ckpt_path:
            self.ckpt_path = str(find_checkpoint(options.ckpt_path, log_folder(options.trainer)))
        elif self.config.subcommand != "fit":
            raise UserError(
                f"{self.config.subcommand} needs a trained network: give --ckpt_path with a file, or with best or "
                "last for those of the newest run."
            )
        if self.ckpt_path:
            checkpoint = read_checkpoint(self.ckpt_path, options.data.digits)
            if self.config.subcommand == "fit":
                check_recipe(self.ckpt_path, checkpoint, recipe(options))
                self.run, self.start_step = Path(self.ckpt_path).parent.parent, checkpoint["global_step"]

    def before_instantiate_classes(self) -> None:
        """Spread validations over the fit, and take torchrun's number of processes, unless the user says otherwise."""
        trainer = self.config[self.subcommand].trainer
        if "TORCHELASTIC_RUN_ID" in os.environ:
            world_size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
            if trainer.devices == "auto":
                trainer.devices, trainer.num_nodes = local, world_size // local
            if str(trainer.devices) != str(local) or trainer.num_nodes * local != world_size:
                raise UserError(
                    f"torchrun has started {world_size} processes, {local} on this machine, and --trainer.devices "
                    f"{trainer.devices} --trainer.num_nodes {trainer.num_nodes} are others; leave these options out."
                )
        if trainer.check_val_every_n_epoch is None:
            trainer.check_val_every_n_epoch = max(1, (trainer.max_epochs or 0) // CHECKS_PER_FIT)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the logger, the checkpoints and the progress bar, each unless the user says otherwise."""
        options = self.config_init[self.subcommand].trainer
        fitting = self.subcommand == "fit"
        if not fitting:
            self.save_config_callback = None
            kwargs["enable_checkpointing"] = False
        if options.logger is None:
            kwargs["logger"] = fitting and self.instantiate_logger(log_folder(options))
        callbacks = []
        if fitting and options.enable_checkpointing is not False:
            self.last = LastCheckpoint(options.check_val_every_n_epoch)
            self.best = ModelCheckpoint(
                filename="best",
                monitor="val/loss",
                save_on_train_epoch_end=False,
                enable_version_counter=False,
            )
            callbacks += [self.last, self.best]
        if options.enable_progress_bar is not False:
            callbacks.append(FitProgressBar())
        if fitting:
            callbacks.append(TensorBoardPictures())
        self.trainer_defaults["callbacks"] = callbacks
        plugins = options.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), WholeCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs)
        if isinstance(trainer.strategy, DDPStrategy):
            if isinstance(options.strategy, str):  # not one with a limit of its own
                trainer.strategy._timeout = PATIENCE
            trainer.callbacks.append(EndTogether())
        return trainer

    def instantiate_logger(self, logs: Path) -> TensorBoardLogger:
        """A logger for a new run; a run that goes on keeps its folder, and its curves up to the checkpoint."""
        version = self.run.name if self.run and self.run.parent == logs else None
        purge = {} if version is None else {"purge_step": self.start_step}
        logger = TensorBoardLogger(logs.parent, logs.name, version, default_hp_metric=False, **purge)
        if rank_zero_only.rank == 0 and (job := torchrun_job()):
            marker = Path(logger.log_dir, MARKER)
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(job)
        return logger

    def fit(self, model: LitThreeSeven, datamodule: ThreeSevenDataModule) -> None:
        """Train; in the main job, test the best weights too."""
        trainer = self.trainer
        if local_rank() == 0:  # whatever is wrong with the data is told before anything is written
            datamodule.trainer = trainer
            datamodule.setup()
        start = time.perf_counter()
        trainer.fit(model, datamodule, ckpt_path=self.ckpt_path, weights_only=True)
        self.fit_seconds = time.perf_counter() - start

        rows = {"Images": f"{len(datamodule.train):,} to train, {len(datamodule.val):,} to validate"}
        checkpoint = None
        if trainer.checkpoint_callback and not trainer.fast_dev_run:
            last = str(Path(self.last.dirpath, "last.ckpt"))
            trainer.save_checkpoint(last)  # the last epoch need not be one of those that were saved
            checkpoint = self.best.best_model_path or last
        if self.main_job:
            metrics = trainer.test(model, datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False)[0]
            rows["Images"] += f", {len(datamodule.test):,} to test"
            rows |= metric_rows(metrics)
        rows["Training time"] = f"{self.fit_seconds:.1f} s, {trainer.current_epoch:,} epochs"
        if checkpoint:
            rows["Checkpoint"] = relative(checkpoint)
        if isinstance(trainer.logger, TensorBoardLogger):
            program = (
                "tensorboard"
                if shutil.which("tensorboard")
                else relative(Path(sys.executable).with_name("tensorboard"))
            )
            rows["Curves"] = f"{program} --logdir {relative(trainer.logger.root_dir)}"
        self.report(rows)

    def validate(self, model: LitThreeSeven, datamodule: ThreeSevenDataModule) -> None:
        """Say how good a checkpoint is on the held-out images."""
        if not datamodule.val_fraction:
            raise UserError("val_fraction is 0, which leaves nothing to validate on; give --data.val_fraction 0.1.")
        metrics = self.trainer.validate(model, datamodule, self.ckpt_path, weights_only=True, verbose=False)[0]
        self.report({"Images": f"{len(datamodule.val):,}"} | metric_rows(metrics))

    def test(self, model: LitThreeSeven, datamodule: ThreeSevenDataModule) -> None:
        """Say how good a checkpoint is on the test images."""
        metrics = self.trainer.test(model, datamodule, self.ckpt_path, weights_only=True, verbose=False)[0]
        self.report({"Images": f"{len(datamodule.test):,}"} | metric_rows(metrics))

    def predict(self, model: LitThreeSeven, datamodule: ThreeSevenDataModule) -> None:
        """Write what a checkpoint makes of each test image beside the checkpoint."""
        batches = self.trainer.predict(model, datamodule, ckpt_path=self.ckpt_path, weights_only=True)
        digit, probability = (torch.cat([batch[name] for batch in batches]) for name in ("digit", "probability"))
        first, second = datamodule.digits
        truth = torch.where(datamodule.test.y == 1, first, second)
        path = Path(self.ckpt_path).with_suffix(".predictions.csv")
        if self.trainer.is_global_zero:
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["image", "truth", "digit", f"probability of {first}"])
                columns = (column.squeeze(1).tolist() for column in (truth, digit, probability))
                writer.writerows([image, *row] for image, row in enumerate(zip(*columns, strict=True)))
        right = int((digit == truth).sum())
        self.report({"Images": f"{len(truth):,}, {right:,} of them right", "Predictions": relative(path)})

    def report(self, rows: dict[str, str]) -> None:
        """Print a short table, once for all processes."""
        if self.trainer.is_global_zero:
            print("\n".join(f"{name:<15} {value}" for name, value in rows.items()))


def log_folder(trainer: Namespace) -> Path:
    """The folder that holds one folder per run: `logs` in the trainer's `default_root_dir`."""
    return Path(trainer.default_root_dir or ".").resolve() / "logs"


def recipe(options: Namespace) -> dict[str, Any]:
    """What decides where a training ends: the arguments that a run can't go on with others of.

    Args:
        options: The arguments of fit.
    """
    settings = {f"model.{name}": options.model[name] for name in ("lr", "init_std")}
    settings |= {f"data.{name}": options.data[name] for name in ("source", "batch_size", "val_fraction", "seed")}
    optimizer = options.get("optimizer")
    settings["optimizer"] = optimizer.class_path.split(".")[-1] if optimizer else "SGD"
    return settings | {f"optimizer.{name}": value for name, value in (optimizer.init_args.items() if optimizer else ())}


def torchrun_job() -> str:
    """A name of the torchrun job, on this machine and in all of its attempts; empty without torchrun."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # {log folder of the job}/attempt_{n}/{rank}/error.json
    return str(Path(error_file).parents[2]) if error_file else ""


def meet_again(logs: Path) -> Path | None:
    """Prepare a program that torchrun has restarted: its processes agree on the run to go on with, and where to meet.

    They meet at a new port, since torchrun's own store may still hold the addresses of the processes before them.

    Args:
        logs: Folder that holds the runs.

    Returns:
        The folder of the run that was begun before; None if there is none yet.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, is_master=False, timeout=PATIENCE)
    key = f"lit_threeseven/attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if rank_zero_only.rank == 0:
        begun = [path.parent for path in logs.glob(f"*/{MARKER}") if path.read_text() == torchrun_job()]
        with socket.socket() as listener:
            listener.bind(("", 0))
            store.set(key, f"{listener.getsockname()[1]} {begun[0] if begun else ''}")
    new_port, run = store.get(key).decode().split(" ", 1)
    os.environ |= {"MASTER_PORT": new_port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return Path(run) if run else None


def metric_rows(metrics: dict[str, float]) -> dict[str, str]:
    """Lightning's metrics as rows for people: `test/auroc` becomes `Test AUROC`."""
    formats = {"loss": ("loss", ".4f"), "accuracy": ("accuracy", ".2%"), "auroc": ("AUROC", ".4f")}
    rows = {}
    for key, value in metrics.items():
        stage, name = key.split("/")
        label, form = formats[name]
        rows[f"{stage.capitalize()} {label}"] = f"{value:{form}}"
    return dict(sorted(rows.items(), reverse=True))


def relative(path: str | Path) -> str:
    """A path as short as it can be typed here."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def silence_libraries() -> None:
    """Leave out what nobody at the terminal can do anything about, and tell other warnings in a line each."""
    warnings.formatwarning = lambda message, *_, **__: f"lit-threeseven: warning: {message}\n"
    threading.excepthook = lambda thread: (
        # TensorBoard's writer: what stops it is raised in the main thread too
        None if issubclass(thread.exc_type, OSError) else threading.__excepthook__(thread)
    )
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*LeafSpec.*is deprecated",
        r".*smaller than the logging interval",  # a full batch is one batch per epoch
        r".*configure_optimizers` will be overridden",  # by --optimizer, as asked for
        r".*callbacks used to create the checkpoint need to be provided",  # not to test or predict
        r".*across ranks is zero",  # val_fraction=0
        r".*was called before the ``update`` method",  # a process without a share
        r".*Checkpoint directory .* exists and is not empty",  # a resumed run
        r".*The dirpath has changed",  # a run resumed from a checkpoint that was moved
    ):
        warnings.filterwarnings("ignore", message=message)


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends it with a sentence and exit code 1.

    Args:
        args: Command line without the program's name; None means this process's.
    """
    silence_libraries()
    try:
        ThreeSevenCLI(sys.argv[1:] if args is None else args)
    except Stopped as stopped:
        if rank_zero_only.rank == 0:
            print(f"lit-threeseven: {stopped}", file=sys.stderr)
        sys.exit(0 if local_rank() else stopped.exit_code)  # Lightning takes another code of a process for its failure
    except ArgumentError as error:
        sentence = " ".join(str(error).split())
        sentence = re.sub(r"<class '(\w+)'>", r"\1", re.sub(r'Parser key "(.+?)":', r"--\1:", sentence))
        fail(f"{sentence} (`lit-threeseven fit --help` explains every option)")
    except (UserError, MisconfigurationException) as error:
        fail(str(error))
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        fail(
            f"{error.filename or 'The folder of this run'} can't be used ({error.strerror}); mend that, or choose "
            "others with --trainer.default_root_dir (logs and checkpoints) and --data.data_dir (MNIST). What was saved "
            "before is whole."
        )
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and not LOST.search(str(error)):
            raise
        reason = str(error).splitlines()[0].partition(". This is typically")[0]
        fail(lost(reason))


def lost(reason: str) -> str:
    """What to say when other processes are not there."""
    return (
        f"The processes of this run lost one another, or did not all come ({reason}). If none of them says why, "
        "start all nodes with the same number of nodes and devices, and with the MASTER_ADDR and a free "
        "MASTER_PORT of the first."
    )


def local_rank() -> int:
    """Number of this process on its machine; 0 where there is one."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def fail(sentence: str) -> None:
    """End with exit code 1, and with a sentence from one process of each machine."""
    sys.exit(1 if local_rank() else f"lit-threeseven: error: {sentence}")
