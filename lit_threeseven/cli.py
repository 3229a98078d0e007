"""The command line: `LightningCLI` with the defaults of the main job, and errors told in a sentence."""

import csv
import errno
import io
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed

from lit_threeseven import launch
from lit_threeseven.callbacks import FitProgressBar, TensorBoardPictures
from lit_threeseven.checkpoints import (
    BestCheckpoint,
    LastCheckpoint,
    WholeCheckpointIO,
    check_recipe,
    find_checkpoint,
    read_checkpoint,
    write_whole,
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
    "seed_everything": "Seed of the starting W and b; false draws them anew each time.",
    "trainer.check_val_every_n_epoch": "Epochs from one validation, and one saved checkpoint, to the next. Left alone, "
    "there are at most 20 over the whole fit.",
    "trainer.logger": "Where curves go. Left alone, fit writes a TensorBoard run to logs/version_N, and the other "
    "subcommands write none; false switches it off.",
    "trainer.default_root_dir": "Folder that the folder logs is put into. Left alone, the current one.",
    "ckpt_path": "Checkpoint to go on from: a file, or best or last for that of the newest run.",
}

# What the system says of a full or damaged disk.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}

# Arguments of the Trainer that decide where a training ends, and what it takes where they are not given.
DECIDING = {
    "precision": "32-true",
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": "norm",
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
}

# Validations, and saved checkpoints, of a whole fit at most, where `check_val_every_n_epoch` is not given.
CHECKS_PER_FIT = 20


class ThreeSevenCLI(LightningCLI):
    """`LightningCLI` for this network and this data.

    Args:
        args: Command line without the program's name. Without a subcommand it is the main job: fit, then test.
    """

    def __init__(self, args: list[str]) -> None:
        self.main_job = not args or (args[0].startswith("-") and args[0] not in ("-h", "--help"))
        self.job = launch.job_name(args)
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
        if self.config.subcommand == "fit":
            self.run = launch.restarted_run(log_folder(options.trainer), self.job)
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
                if "optimizer_states" not in checkpoint:
                    raise UserError(f"{self.ckpt_path} holds weights alone, and no run to go on with; give another.")
                check_recipe(self.ckpt_path, checkpoint, recipe(options))
                self.run, self.start_step = Path(self.ckpt_path).parent.parent, checkpoint["global_step"]
            elif self.config.subcommand == "validate":  # on the images that were held out then
                check_recipe(self.ckpt_path, checkpoint, held_out(options))

    def before_instantiate_classes(self) -> None:
        """Spread validations over the fit, and take the number of processes that were started.

        Both unless the user says otherwise.
        """
        options = self.config[self.subcommand]
        trainer = options.trainer
        if started := launch.processes_started():
            starter, world_size, local = started
            if starter == "srun":
                os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(local))  # Lightning insists on it
            if trainer.devices == "auto":
                trainer.devices, trainer.num_nodes = local, world_size // local
            if str(trainer.devices) != str(local) or trainer.num_nodes * local != world_size:
                raise UserError(
                    f"{starter} has started {world_size} processes, {local} on this machine, and --trainer.devices "
                    f"{trainer.devices} --trainer.num_nodes {trainer.num_nodes} are others; leave these options out."
                )
        self.check_every = trainer.check_val_every_n_epoch or max(1, -(-(trainer.max_epochs or 0) // CHECKS_PER_FIT))
        if type(trainer.val_check_interval) is not int:  # which is steps, over epochs if need be
            trainer.check_val_every_n_epoch = self.check_every
        optimizer = options.get("optimizer")
        if options.get("lr_scheduler") and not optimizer:
            raise UserError("--lr_scheduler needs an --optimizer to schedule, such as --optimizer SGD.")
        lr = optimizer.init_args.get("lr") if optimizer else None
        if isinstance(lr, int | float) and not 0 < lr < math.inf:
            raise UserError(f"optimizer.lr must be a finite number above 0, got {lr}.")

    def instantiate_classes(self) -> None:
        """Build model, data, optimizer and Trainer; what one of them says of its arguments is for the user."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UserError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the logger, the checkpoints and the progress bar, each unless the user says otherwise."""
        options = self.config_init[self.subcommand].trainer
        fitting = self.subcommand == "fit"
        if not fitting or options.logger is False:  # there is no folder of the run to put it into
            self.save_config_callback = None
        if not fitting:
            kwargs["enable_checkpointing"] = False
        if options.logger is None:
            kwargs["logger"] = fitting and self.instantiate_logger(log_folder(options))
        callbacks = []
        if fitting and options.enable_checkpointing is not False:
            self.last, self.best = LastCheckpoint(self.check_every), BestCheckpoint()
            made_with = recipe(self.config[self.subcommand])
            note = LambdaCallback(on_save_checkpoint=lambda trainer, module, state: state.update(recipe=made_with))
            callbacks += [self.last, self.best, note]
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
                trainer.strategy._timeout = launch.PATIENCE
            trainer.callbacks.append(launch.EndTogether())
        return trainer

    def instantiate_logger(self, logs: Path) -> TensorBoardLogger:
        """A logger for a new run; a run that goes on keeps its folder, and its curves up to the checkpoint."""
        version = self.run.name if self.run and self.run.parent == logs else None
        purge = {} if version is None else {"purge_step": self.start_step}
        logger = TensorBoardLogger(logs.parent, logs.name, version, default_hp_metric=False, **purge)
        if rank_zero_only.rank == 0 and self.job:
            marker = Path(logger.log_dir, launch.MARKER)
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.write_text(self.job)
        return logger

    def fit(self, model: LitThreeSeven, datamodule: ThreeSevenDataModule) -> None:
        """Train; in the main job, test the best weights too."""
        trainer = self.trainer
        if launch.local_rank() == 0:  # whatever is wrong with the data is told before anything is written
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
        truth = torch.where(datamodule.test.y == 1, first, second)[: len(digit)]  # limit_predict_batches may be given
        path = Path(self.ckpt_path).with_suffix(".predictions.csv")
        if self.trainer.is_global_zero:
            file = io.StringIO()
            writer = csv.writer(file)
            writer.writerow(["image", "truth", "digit", f"probability of {first}"])
            columns = (column.squeeze(1).tolist() for column in (truth, digit, probability))
            writer.writerows([image, *row] for image, row in enumerate(zip(*columns, strict=True)))
            write_whole(path, file.getvalue().encode())
        right = int((digit == truth).sum())
        self.report({"Images": f"{len(truth):,}, {right:,} of them right", "Predictions": relative(path)})

    def report(self, rows: dict[str, str]) -> None:
        """Print a short table, once for all processes."""
        if self.trainer.is_global_zero:
            print("\n".join(f"{name:<15} {value}" for name, value in rows.items()))


def log_folder(trainer: Namespace) -> Path:
    """The folder that holds one folder per run: `logs` in the trainer's `default_root_dir`."""
    return Path(trainer.default_root_dir or ".", "logs").resolve()


def recipe(options: Namespace) -> dict[str, Any]:
    """What decides where a training ends: the arguments that a run can't go on with others of.

    Args:
        options: The arguments of a subcommand.
    """
    settings = {f"model.{name}": options.model[name] for name in ("lr", "init_std")}
    settings |= held_out(options) | {"data.batch_size": options.data.batch_size}
    settings |= {f"trainer.{name}": str(options.trainer[name] or usual) for name, usual in DECIDING.items()}
    sgd = torch.optim.SGD([torch.empty(0)]).defaults | {"lr": options.model.lr}
    for kind, default in (("optimizer", Namespace(class_path="SGD", init_args=sgd)), ("lr_scheduler", None)):
        chosen = options.get(kind) or default
        settings[kind] = chosen and chosen.class_path.split(".")[-1]
        settings |= {f"{kind}.{name}": value for name, value in (chosen.init_args.items() if chosen else ())}
    kept = int | float | str | None  # a checkpoint is read without running code: no classes in it
    return {name: value if isinstance(value, kept) else str(value) for name, value in settings.items()}


def held_out(options: Namespace) -> dict[str, Any]:
    """The arguments that decide which images are held out for validation."""
    return {f"data.{name}": options.data[name] for name in ("source", "val_fraction", "seed")}


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
        # Lightning takes another code of a process that it has started for its failure
        sys.exit(0 if launch.local_rank() else stopped.exit_code)
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
        if not isinstance(error, distributed.DistError) and not launch.LOST.search(str(error)):
            raise
        reason = str(error).splitlines()[0].partition(". This is typically")[0]
        fail(launch.lost(reason))


def fail(sentence: str) -> None:
    """End with exit code 1, and with a sentence from one process of each machine."""
    sys.exit(1 if launch.local_rank() else f"lit-threeseven: error: {sentence}")
