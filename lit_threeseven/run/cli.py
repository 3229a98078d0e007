"""The command line: `LightningCLI` with the defaults of the main job, and errors in one sentence."""

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, ReduceLROnPlateau
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lit_threeseven import (
    LitThreeSeven,
    ThreeSevenDataModule,
    __version__,
    checkpoints,
    processes,
    recipes,
    runs,
    weights,
)
from lit_threeseven.errors import UserError, silence_libraries
from lit_threeseven.resumable import digest
from lit_threeseven.run import options, recipe
from lit_threeseven.signals import Stopped, count, local_rank
from lit_threeseven.use.predictions import PredictionsFile
from lit_threeseven.watch import FitProgressBar, TensorBoardPictures
from lit_threeseven.watch.loggers import forgive


class ThreeSevenCLI(LightningCLI):
    """`LightningCLI` for this network and data; raises `UserError` for what the user can fix, `Stopped` on a signal.

    Args:
        args: Command line without the program's name. Without a subcommand it is the main job: fit, then test.
    """

    def __init__(self, args: list[str]) -> None:
        self.main_job = not args or args[0].startswith("-")
        self.command_line = recipes.with_files(["fit", *args] if self.main_job else args)
        self.trainer: Any = None
        self.last: Any = None
        self.run: Path | None = None
        self.ckpt_path, self.checkpoint = "", dict[str, Any]()
        defaults: dict[str, Any] = {"max_epochs": 2000, "log_every_n_steps": 20, "num_sanity_val_steps": 0}
        defaults |= {"check_val_every_n_epoch": None, "enable_model_summary": False}
        raises = {"exit_on_error": False}  # instead of printing the usage
        try:
            super().__init__(
                LightningModule,
                ThreeSevenDataModule,
                trainer_defaults=defaults,
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},
                subclass_mode_model=True,
                parser_kwargs={"version": __version__} | raises | dict.fromkeys(self.subcommands(), raises),
                args=options.with_model(self.command_line),
            )
        except BaseException as error:
            processes.kill_started(self.trainer)
            sentence = options.sentence(error, self.command_line, getattr(self.trainer, "world_size", 1))
            if sentence is None or sys.flags.dev_mode:
                raise
            raise UserError(sentence) from error

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The given subcommand, or all of them, each with the arguments of its Trainer method that are not options."""
        own, every = {"ckpt_path", "weights_only", "verbose", "return_predictions"}, LightningCLI.subcommands()
        # collecting the options of one takes a tenth of a second
        chosen = {*self.command_line[:1]} & every.keys() or every
        return {name: every[name] | own for name in chosen}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        checkpoint = "Checkpoint to resume or use: a file; best or last, of --run or the newest run; or pretrained."
        name = "The run in logs/NAME: fit starts or resumes it, other commands use its best checkpoint by default."
        parser.add_argument("--ckpt_path", type=str | None, help=checkpoint)
        parser.add_argument("--run", type=str | None, help=name)
        parser.link_arguments("data.digits", "model.init_args.digits")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then find and read the checkpoint before anything is built or written."""
        self.config = parser.parse_args(args)
        subcommand, chosen = self.config.subcommand, self.config[self.config.subcommand]
        work = [{"fit": "train", "validate": "val"}.get(subcommand, subcommand), *(["test"] if self.main_job else [])]
        options.settle(chosen, work)
        processes.take_devices(chosen.trainer)
        self.logs = Path(chosen.trainer.default_root_dir or ".", "logs").resolve()
        if subcommand != "fit":
            if not (chosen.run or chosen.ckpt_path):
                raise UserError(f"{subcommand} needs --run NAME, or --ckpt_path: a file, best, last or pretrained.")
            self.ckpt_path = str(runs.find(chosen.ckpt_path, chosen.run, self.logs).resolve())
        else:
            self.run, path = runs.resumed(chosen.ckpt_path, chosen.run, self.logs)
            self.ckpt_path = str(path or "")
        chosen.ckpt_path = None  # otherwise Lightning takes the model's arguments from it
        if self.ckpt_path:
            self.checkpoint = weights.read(self.ckpt_path)
            if subcommand == "fit" and not weights.RESUMED.keys() <= self.checkpoint.keys():
                raise UserError(f"{self.ckpt_path} contains only weights; training can't resume from it.")
        if subcommand != "fit":
            options.adopt(chosen.model, self.checkpoint)

    @override
    def instantiate_classes(self) -> None:
        """Build everything."""
        with options.from_the_command_line(self.command_line):
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the logger, the checkpoints and the progress bar, each unless the user says otherwise."""
        chosen = self.config_init[self.subcommand].trainer
        fitting = self.subcommand == "fit" and not chosen.fast_dev_run
        callbacks: list[Any] = [FitProgressBar()] if chosen.enable_progress_bar is not False else []
        if not fitting or chosen.logger in (False, []):  # there is no run folder to save the settings in
            self.save_config_callback = None
        asked = chosen.logger if isinstance(chosen.logger, list) else [chosen.logger] if chosen.logger else []
        kwargs["logger"] = loggers = [logger for logger in asked if logger is not True]
        kwargs["enable_checkpointing"] = saving = fitting and chosen.enable_checkpointing is not False
        if fitting:
            kwargs |= options.check_every(chosen, self.datamodule)
            callbacks.append(TensorBoardPictures())
        if fitting and chosen.logger is not False and not isinstance(chosen.logger, list | TensorBoardLogger):
            step = self.checkpoint.get("global_step", 0)  # a killed attempt may have logged later steps
            traced = not step and self.model.example_input_array is not None
            usual: dict[str, Any] = {"log_graph": traced, "default_hp_metric": False, "purge_step": step}
            name = self.run.name if self.run else None
            loggers.insert(0, TensorBoardLogger(self.logs.parent, self.logs.name, name, **usual))
            self.run = Path(loggers[0].log_dir)
        for logger in loggers:
            forgive(logger)
        if saving:
            folder = self.run and self.run / "checkpoints"
            self.best = checkpoints.BestCheckpoint(folder)
            timed = "val_check_interval" in kwargs
            self.last = checkpoints.LastCheckpoint(None if timed else kwargs["check_val_every_n_epoch"] or 1, folder)
            callbacks += [self.last, self.best]
        self.trainer_defaults["callbacks"] = callbacks
        plugins = chosen.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), checkpoints.WholeCheckpointIO()]
        processes.meet(processes.join_torchrun, processes.GRACE)
        with processes.patient_ddp():
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
        data, wanted = self.datamodule, {"data.digits": list(self.datamodule.digits)}
        if isinstance(self.model, LitThreeSeven):
            wanted = {"model.digits": list(self.model.digits)}
        environment = getattr(self.trainer.strategy, "cluster_environment", None)
        if environment:
            with options.from_the_command_line(self.command_line):
                environment.validate_settings(num_devices=self.trainer.num_devices, num_nodes=self.trainer.num_nodes)
        if self.subcommand == "fit":
            if not local_rank():  # the other processes wait for this one's download
                data.setup()
            options.try_out(self.config.fit, self.model, self.trainer, self.command_line)
            wanted |= recipe.recipe(self.config.fit, self.model, data)
            settings = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False, skip_none=False))
            self.trainer.callbacks.append(checkpoints.Notes(wanted, settings["fit"]["model"].get("init_args", {})))
        elif self.subcommand == "validate":
            if not data.val_fraction:
                raise UserError("val_fraction is 0, which leaves nothing to validate on; give --data.val_fraction 0.1.")
            wanted |= {f"data.{name}": data.hparams[name] for name in ("val_fraction", "seed")}
        if self.checkpoint:
            recipe.check(self.ckpt_path, self.checkpoint, self.model, wanted)
        processes.hold_signals(self.trainer)

    def fit(self, model: LightningModule, datamodule: ThreeSevenDataModule) -> None:
        """Train; in the main job, test the best weights too."""
        limits = {name: str(self.config.fit.trainer[name]) for name in ("max_epochs", "max_steps", "max_time")}
        if self.checkpoint.get("finished") == limits:
            run, best = Path(self.ckpt_path).parent.parent, Path(self.ckpt_path).with_name("best.ckpt")
            rows = {"Finished": f"{os.path.relpath(run)}, {count(self.checkpoint['epoch'])}"}
            used = str(best) if best.is_file() else self.ckpt_path
            return self.report(rows | (self.checkpoint.get("tested") or self.tested(used) if self.main_job else {}))
        if self.trainer.world_size == 1 and self.trainer.strategy.root_device.type == "cpu":
            processes.choose_threads(model, datamodule)
        before = time.perf_counter()
        with runs.working_in(self.run) if self.run and self.trainer.is_global_zero else nullcontext():
            self.trainer.fit(model, datamodule, ckpt_path=self.ckpt_path or None, weights_only=True)
            self.fit_seconds = time.perf_counter() - before
            self.finish(limits)

    def finish(self, limits: dict[str, str]) -> None:
        """Save the end of a fit, test it in the main job, and report."""
        trainer, data, optimizer = self.trainer, self.datamodule, self.trainer.optimizers[0]
        rows = {"Images": f"{len(data.train):,} to train, {len(data.val):,} to validate"}
        end = {"Optimizer": f"{type(optimizer).__name__}, learning rate {optimizer.param_groups[0]['lr']:g}"}
        begun = self.checkpoint.get("epoch", 0)
        end["Training time"] = f"{self.fit_seconds:.1f} s, {count(trainer.current_epoch - begun)}"
        end["Training time"] += f" after the first {begun:,}" if begun else ""
        last = checkpoint = self.last and str(Path(self.last.dirpath, "last.ckpt"))
        if last:
            trainer.save_checkpoint(last)  # the last epoch may not be saved yet
            checkpoint = self.best.best_model_path or last
            end["Checkpoint"] = os.path.relpath(checkpoint)
        if isinstance(trainer.logger, TensorBoardLogger):
            program, logs = Path(sys.executable).with_name("tensorboard"), trainer.logger.root_dir
            end["Curves"] = f"{os.path.relpath(program)} --logdir {os.path.relpath(logs)}"
        tested = self.tested(checkpoint) if self.main_job else {}
        if tested:
            rows |= tested
            rows["Images"] += f", {len(data.test):,} to test"
            end["Digest"] = digest(self.model)  # of the weights that were tested
        if last and trainer.is_global_zero:  # after the test: a run killed during it is tested when resumed
            finished = weights.read(last) | {"finished": limits, "tested": tested}
            checkpoints.WholeCheckpointIO().save_checkpoint(finished, last)
        self.report(rows | end)

    def tested(self, ckpt_path: str | None) -> dict[str, str]:
        """Test a checkpoint, or the network as it is; the metrics as rows, none if the network has no test step."""
        if self.main_job and type(self.model).test_step is LightningModule.test_step:
            return {}
        data: dict[str, Any] = {"datamodule": self.datamodule, "weights_only": True, "verbose": False}
        return options.metric_rows(self.trainer.test(self.model, ckpt_path=ckpt_path, **data)[0])

    def validate(self, model: LightningModule, datamodule: ThreeSevenDataModule) -> None:
        """Measure a checkpoint on the held-out images."""
        metrics = self.trainer.validate(model, datamodule, self.ckpt_path, weights_only=True, verbose=False)[0]
        self.report({"Images": f"{len(datamodule.val):,}"} | options.metric_rows(metrics))

    def test(self, model: LightningModule, datamodule: ThreeSevenDataModule) -> None:
        """Measure a checkpoint on the test images."""
        rows = self.tested(self.ckpt_path)
        self.report({"Images": f"{len(datamodule.test):,}"} | rows)

    def predict(self, model: LightningModule, datamodule: ThreeSevenDataModule) -> None:
        """Write a network's answers for the test images to a CSV file."""
        if type(model).predict_step is LightningModule.predict_step:
            raise UserError(f"{type(model).__name__} needs a predict_step that takes a batch, x and y.")
        path = Path(self.ckpt_path).with_suffix(".predictions.csv")
        if path.parent == weights.PRETRAINED:
            path = Path(path.name)
        answers = PredictionsFile(datamodule, None if self.trainer.fast_dev_run else path)
        self.trainer.callbacks.append(answers)
        settings: dict[str, Any] = {"weights_only": True, "return_predictions": False}
        self.trainer.predict(model, datamodule, ckpt_path=self.ckpt_path, **settings)
        rows = {"Images": f"{answers.images:,}"}
        if answers.right is not None:
            rows["Images"] += f", {answers.right:,} of them right"
        if answers.path:
            rows["Predictions"] = os.path.relpath(path)
        self.report(rows)

    def report(self, rows: dict[str, str]) -> None:
        """Print a short table, once for all processes."""
        if self.trainer.is_global_zero:
            print("\n".join(f"{name:<15} {value}" for name, value in rows.items()))
            if self.trainer.profiler:
                print(self.trainer.profiler.summary(), end="")


def main(args: list[str]) -> None:
    """Run the command line; a user's mistake ends it with a sentence and exit code 1."""
    silence_libraries()
    try:
        ThreeSevenCLI(args)
    except Stopped as stopped:
        if stopped.checkpoint:
            named = any(arg.partition("=")[0] == "--run" for arg in args)
            stopped.what += (
                f" To resume, run the same command{'' if named else f' with --ckpt_path {stopped.checkpoint}'}"
            )
        raise
    except UserError as error:
        if sys.flags.dev_mode:
            raise
        time.sleep(processes.GRACE if local_rank() else 0)  # the first process's sentence is enough
        sys.exit(f"lit-threeseven: error: {error}")
