"""The command line: `LightningCLI` with the defaults of the main job, and errors in one sentence."""

import os
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, ReduceLROnPlateau
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed
from typing_extensions import override

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.errors import UserError
from lit_threeseven.networks import load
from lit_threeseven.run import checkpoints, launch, options
from lit_threeseven.use import predict
from lit_threeseven.watch import FitProgressBar, TensorBoardPictures
from lit_threeseven.weights import PRETRAINED

DESCRIPTION = """
Learn to tell handwritten threes from sevens. Without a subcommand it does the main job: fit, then test, then a short
table; its options are those of fit, see `fit --help`. fit validates and saves at most 20 times unless told otherwise;
validate and test measure a checkpoint, and predict answers pictures, or writes its answer for each test image.
"""


class ThreeSevenCLI(LightningCLI):
    """`LightningCLI` for this network and this data; raises `UserError` for what the user can fix, and `Stopped`.

    Args:
        args: Command line without the program's name. Without a subcommand it is the main job: fit, then test.
    """

    def __init__(self, args: list[str]) -> None:
        self.main_job = not args or (args[0].startswith("-") and args[0] not in ("-h", "--help", "--version"))
        self.command_line = ["fit", *args] if self.main_job else args
        self.trainer: Any = None
        self.last: Any = None
        self.ckpt_path, self.checkpoint = "", dict[str, Any]()
        defaults: dict[str, Any] = {"max_epochs": 2000, "log_every_n_steps": 20, "num_sanity_val_steps": 0}
        defaults |= {"check_val_every_n_epoch": None, "enable_model_summary": False}
        raises = {"exit_on_error": False}  # instead of printing the usage
        about = {"description": DESCRIPTION, "version": version("lit_threeseven")}
        try:
            super().__init__(
                LitThreeSeven,
                ThreeSevenDataModule,
                trainer_defaults=defaults,
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},
                subclass_mode_model=True,
                parser_kwargs=about | raises | dict.fromkeys(self.subcommands(), raises),
                args=options.with_model(self.command_line),
            )
        except BaseException as error:
            launch.kill_started(self.trainer)
            began = getattr(self.trainer, "global_step", 0) > self.checkpoint.get("global_step", 0)
            sentence = options.explain(error, began, " ".join(self.command_line[1:]), self.ckpt_path)
            if sentence is None or sys.flags.dev_mode:
                raise
            raise UserError(sentence) from error

    @override
    def subcommands(self) -> dict[str, set[str]]:
        """The given subcommand, or all, with the arguments of the Trainer's methods that are not options."""
        own, every = {"ckpt_path", "weights_only", "verbose", "return_predictions"}, LightningCLI.subcommands()
        chosen = {*self.command_line[:1]} & every.keys() or every  # to collect one's options takes a tenth of a second
        return {name: every[name] | own for name in chosen}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        checkpoint = (
            "Checkpoint to resume or use: a file, or best or last of --run or of the newest run, or pretrained."
        )
        name = "Name of the run, kept in logs/NAME: fit resumes it from its last checkpoint, other subcommands use it."
        parser.add_argument("--ckpt_path", type=str | None, help=checkpoint)
        parser.add_argument("--run", type=str | None, help=name)
        parser.link_arguments("data.digits", "model.init_args.digits")
        if self.command_line[:1] == ["predict"]:
            predict.add_options(parser)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then find and read the checkpoint before anything is built or written."""
        options.check_files(args)
        self.config = parser.parse_args(args)
        subcommand, chosen = self.config.subcommand, self.config[self.config.subcommand]
        # the digits are there because the model's are linked to them
        command = [subcommand, "--data.digits=[3, 7]", *self.command_line[1:]]
        given = parser.parse_args(options.with_model(command), defaults=False)[subcommand]
        work = [{"fit": "train", "validate": "val"}.get(subcommand, subcommand), *(["test"] if self.main_job else [])]
        options.settle(chosen, work, "optimizer.init_args.lr" in given)
        launch.take_devices(chosen.trainer)
        self.logs = Path(chosen.trainer.default_root_dir or ".", "logs").resolve()
        self.run, self.ckpt_path = checkpoints.find(self.logs, chosen.run, chosen.ckpt_path, subcommand)
        chosen.ckpt_path = None  # Lightning would take the model's arguments from there
        if self.ckpt_path and not chosen.get("paths"):
            self.checkpoint = checkpoints.read(self.ckpt_path, subcommand == "fit")
            if subcommand != "fit" and "model.init_args" not in given:
                chosen.model = options.network(self.checkpoint, chosen.model)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the logger, the checkpoints and the progress bar, each unless the user says otherwise."""
        chosen = self.config_init[self.subcommand].trainer
        fitting = self.subcommand == "fit" and not chosen.fast_dev_run
        if fitting and not self.run and Path(self.ckpt_path).parents[2:3] == (self.logs,):
            self.run = Path(self.ckpt_path).parent.parent
        if not fitting or chosen.logger is False:  # there is no run folder to put it in
            self.save_config_callback = None
        kwargs["logger"] = False if chosen.logger is None else chosen.logger
        if chosen.logger is None and fitting:
            place = self.logs.parent, self.logs.name, self.run and self.run.name
            step = self.checkpoint.get("global_step", 0)  # an attempt that was killed may have left later curves
            kwargs["logger"] = TensorBoardLogger(*place, log_graph=not step, default_hp_metric=False, purge_step=step)
            self.run = Path(kwargs["logger"].log_dir)
        callbacks: list[Any] = []
        kwargs["enable_checkpointing"] = saving = fitting and chosen.enable_checkpointing is not False
        if saving:
            folder = self.run and self.run / "checkpoints"
            self.best = checkpoints.BestCheckpoint(folder)
            self.last = checkpoints.LastCheckpoint(options.check_every(self.config.fit.trainer), folder)
            note = LambdaCallback(on_save_checkpoint=lambda trainer, module, state: state.update(recipe=self.recipe))
            callbacks += [self.last, self.best, note]
        callbacks += [FitProgressBar()] if chosen.enable_progress_bar is not False else []
        callbacks += [TensorBoardPictures()] if fitting else []
        self.trainer_defaults["callbacks"] = callbacks
        plugins = chosen.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), checkpoints.WholeCheckpointIO()]
        launch.meet(launch.join_torchrun, launch.GRACE)
        with launch.patient_ddp():
            return super().instantiate_trainer(**kwargs)

    @staticmethod
    @override
    def configure_optimizers(lightning_module: LightningModule, optimizer: Any, lr_scheduler: Any = None) -> Any:
        """Step a scheduler that monitors a validation metric once per validation."""
        chosen = LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)
        if isinstance(lr_scheduler, ReduceLROnPlateau) and lr_scheduler.monitor.startswith("val/"):
            chosen["lr_scheduler"]["frequency"] = lightning_module.trainer.check_val_every_n_epoch or 1
        return chosen

    @override
    def after_instantiate_classes(self) -> None:
        """Check what can be checked before anything is written."""
        data, wanted = self.datamodule, {"model.digits": list(self.model.digits)}
        if self.subcommand == "fit":
            if launch.local_rank() == 0:  # the other processes wait for this one's download
                data.setup()
            wanted = self.recipe = wanted | options.recipe(self.config.fit, self.model, data)
        elif self.subcommand == "validate":
            if not data.val_fraction:
                raise UserError("val_fraction is 0, which leaves nothing to validate on; give --data.val_fraction 0.1.")
            wanted |= {f"data.{name}": data.hparams[name] for name in ("val_fraction", "seed")}
        if self.checkpoint:
            checkpoints.check(self.ckpt_path, self.checkpoint, self.model, wanted)
        launch.hold_signals(self.trainer)

    def fit(self, model: LitThreeSeven, datamodule: ThreeSevenDataModule) -> None:
        """Train; in the main job, test the best weights too."""
        limits = {name: str(self.config.fit.trainer[name]) for name in ("max_epochs", "max_steps", "max_time")}
        if self.checkpoint.get("finished") == limits:
            run, epochs = Path(self.ckpt_path).parent.parent, checkpoints.count(self.checkpoint["epoch"])
            return self.report({"Finished": f"{os.path.relpath(run)}, {epochs}"})
        with checkpoints.working_in(self.run) if self.run and rank_zero_only.rank == 0 else nullcontext():
            start = time.perf_counter()
            self.trainer.fit(model, datamodule, ckpt_path=self.ckpt_path or None, weights_only=True)
            self.fit_seconds = time.perf_counter() - start
            self.finish(limits)

    def finish(self, limits: dict[str, str]) -> None:
        """Save the end of a fit, test it in the main job, and report."""
        trainer, data, optimizer = self.trainer, self.datamodule, self.trainer.optimizers[0]
        rows = {"Images": f"{len(data.train):,} to train, {len(data.val):,} to validate"}
        end = {"Optimizer": f"{type(optimizer).__name__}, learning rate {optimizer.param_groups[0]['lr']:g}"}
        end["Training time"] = f"{self.fit_seconds:.1f} s, {checkpoints.count(trainer.current_epoch)}"
        last = checkpoint = self.last and str(Path(self.last.dirpath, "last.ckpt"))
        if last:
            trainer.save_checkpoint(last)  # the last epoch may not have been saved yet
            checkpoint = self.best.best_model_path or last
            end["Checkpoint"] = os.path.relpath(checkpoint)
        if isinstance(trainer.logger, TensorBoardLogger):
            program, logs = Path(sys.executable).with_name("tensorboard"), trainer.logger.root_dir
            end["Curves"] = f"{os.path.relpath(program)} --logdir {os.path.relpath(logs)}"
        if self.main_job:
            metrics = trainer.test(self.model, data, ckpt_path=checkpoint, weights_only=True, verbose=False)[0]
            rows["Images"] += f", {len(data.test):,} to test"
            rows |= options.metric_rows(metrics)
            end["Digest"] = self.model.digest()  # of the weights that were tested
        if last and trainer.is_global_zero:  # after the test: a run killed during it is tested when resumed
            finished = checkpoints.read(last, True) | {"finished": limits}
            checkpoints.WholeCheckpointIO().save_checkpoint(finished, last)
        self.report(rows | end)

    def validate(self, model: LitThreeSeven, datamodule: ThreeSevenDataModule) -> None:
        """Measure a checkpoint on the held-out images."""
        metrics = self.trainer.validate(model, datamodule, self.ckpt_path, weights_only=True, verbose=False)[0]
        self.report({"Images": f"{len(datamodule.val):,}"} | options.metric_rows(metrics))

    def test(self, model: LitThreeSeven, datamodule: ThreeSevenDataModule) -> None:
        """Measure a checkpoint on the test images."""
        metrics = self.trainer.test(model, datamodule, self.ckpt_path, weights_only=True, verbose=False)[0]
        self.report({"Images": f"{len(datamodule.test):,}"} | options.metric_rows(metrics))

    def predict(self, model: LitThreeSeven, datamodule: ThreeSevenDataModule) -> None:
        """Print a network's answers for pictures, or write those for the test images to a CSV file."""
        chosen = self.config.predict
        if chosen.paths:
            if self.trainer.is_global_zero:
                predict.report(load(self.ckpt_path, type(model)), chosen.paths, chosen.format, chosen.explain)
            return
        batches = self.trainer.predict(model, datamodule, ckpt_path=self.ckpt_path, weights_only=True)
        shares = [batches] * self.trainer.world_size
        if len(shares) > 1:
            distributed.all_gather_object(shares, batches)
        content, right, count = predict.table([batch for share in shares for batch in share], datamodule)
        rows = {"Images": f"{count:,}, {right:,} of them right"}
        if not self.trainer.fast_dev_run:
            path = Path(self.ckpt_path).with_suffix(".predictions.csv")
            path = Path(path.name) if path.parent == PRETRAINED else path
            if self.trainer.is_global_zero:
                checkpoints.write_whole(path, content.encode())
            rows["Predictions"] = os.path.relpath(path)
        self.report(rows)

    def report(self, rows: dict[str, str]) -> None:
        """Print a short table, once for all processes."""
        if self.trainer.is_global_zero:
            print("\n".join(f"{name:<15} {value}" for name, value in rows.items()))


def main(args: list[str] | None = None) -> None:
    """Run the command line, by default this process's; a user's mistake ends it with a sentence and exit code 1."""
    options.silence_libraries()
    args = sys.argv[1:] if args is None else args
    try:
        ThreeSevenCLI(args)
    except checkpoints.Stopped as stopped:
        if rank_zero_only.rank == 0:
            named = any(arg.partition("=")[0] == "--run" for arg in args)
            more = "" if named else f" with --ckpt_path {stopped.checkpoint}"
            resume = f" To resume, run the same command{more}" if stopped.checkpoint else ""
            print(f"lit-threeseven: {stopped.what}{resume}", file=sys.stderr)
        sys.exit(0 if launch.local_rank() else stopped.exit_code)  # Lightning takes other codes for failures
    except UserError as error:
        time.sleep(launch.GRACE if launch.local_rank() else 0)  # the first process's sentence is enough
        sys.exit(f"lit-threeseven: error: {error}")
