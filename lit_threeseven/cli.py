"""The command line: `LightningCLI` with the defaults of the main job, and errors told in a sentence."""

import csv
import logging
import re
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, distributed

from lit_threeseven.callbacks import FitProgressBar, LastCheckpoint
from lit_threeseven.datamodule import ThreeSevenDataModule
from lit_threeseven.errors import UserError
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

# Validations, and saved checkpoints, of a whole fit where `check_val_every_n_epoch` is not given.
CHECKS_PER_FIT = 20


class ThreeSevenCLI(LightningCLI):
    """`LightningCLI` for this network and this data.

    Args:
        args: Command line without the program's name. Without a subcommand it is the main job: fit, then test.
    """

    def __init__(self, args: list[str]) -> None:
        self.main_job = not args or (args[0].startswith("-") and args[0] not in ("-h", "--help"))
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
        self.ckpt_path = None
        if options.ckpt_path:
            self.ckpt_path = str(find_checkpoint(options.ckpt_path, log_folder(options.trainer)))
            check_checkpoint(self.ckpt_path, options.data.digits)
        elif self.config.subcommand != "fit":
            raise UserError(
                f"{self.config.subcommand} needs a trained network: give --ckpt_path with a file, or with best or "
                "last for those of the newest run."
            )

    def before_instantiate_classes(self) -> None:
        """Spread validations over the fit where the user has not said how often."""
        trainer = self.config[self.subcommand].trainer
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
            logs = log_folder(options)
            run = self.ckpt_path and Path(self.ckpt_path).parent.parent
            version = run.name if run and run.parent == logs else None  # a resumed run goes on in its own folder
            kwargs["logger"] = fitting and TensorBoardLogger(logs.parent, logs.name, version, default_hp_metric=False)
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
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def fit(self, model: LitThreeSeven, datamodule: ThreeSevenDataModule) -> None:
        """Train; in the main job, test the best weights too."""
        trainer = self.trainer
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
        predictions = gather(self.trainer.predict(model, datamodule, ckpt_path=self.ckpt_path, weights_only=True))
        digit, probability = predictions["digit"], predictions["probability"]
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


def find_checkpoint(ckpt_path: str, logs: Path) -> Path:
    """The file that `--ckpt_path` means.

    Args:
        ckpt_path: A path, or "best" or "last" for those of the newest run.
        logs: Folder that holds the runs.

    Raises:
        UserError: If there is no such file.
    """
    if ckpt_path in ("best", "last"):
        found = sorted(logs.glob(f"version_*/checkpoints/{ckpt_path}.ckpt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"There is no run with a {ckpt_path} checkpoint in {logs}; train first, or give its file.")
        return found[-1]
    if not Path(ckpt_path).is_file():
        raise UserError(f"There is no checkpoint file {ckpt_path}; give a file, or best or last of the newest run.")
    return Path(ckpt_path).resolve()


def check_checkpoint(path: str, digits: tuple[int, int]) -> None:
    """Check that a file holds this network, without running any code that it may contain.

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


def gather(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the predictions of all batches and processes, in the order of the data."""
    shares = [batches]
    if distributed.is_initialized():
        shares = [None] * distributed.get_world_size()
        distributed.all_gather_object(shares, batches)
    in_order = [share for batch in zip(*shares, strict=True) for share in batch]
    return {name: torch.cat([share[name] for share in in_order]) for name in in_order[0]}


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
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*LeafSpec.*is deprecated",
        r".*smaller than the logging interval",  # a full batch is one batch per epoch
        r".*configure_optimizers` will be overridden",  # by --optimizer, as asked for
        r".*callbacks used to create the checkpoint need to be provided",  # not to test or predict
        r".*across ranks is zero",  # val_fraction=0
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
    except ArgumentError as error:
        sentence = re.sub(
            r"<class '(\w+)'>", r"\1", re.sub(r'Parser key "(.+?)":', r"--\1:", " ".join(str(error).split()))
        )
        sys.exit(f"lit-threeseven: error: {sentence} (`lit-threeseven fit --help` explains every option)")
    except (UserError, MisconfigurationException) as error:
        sys.exit(f"lit-threeseven: error: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(
            f"lit-threeseven: error: {error.filename} can't be used ({error.strerror}); choose other folders with "
            "--trainer.default_root_dir (logs and checkpoints) and --data.data_dir (MNIST)."
        )
