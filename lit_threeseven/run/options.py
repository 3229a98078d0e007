"""What the user gives and is told: options refused or filled in, errors and warnings as sentences, metrics as rows."""

import errno
import logging
import os
import re
import threading
import traceback
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import distributed

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.errors import UserError
from lit_threeseven.networks import NETWORKS
from lit_threeseven.resumable import arguments
from lit_threeseven.weights import PRETRAINED

# Options that decide where training ends, besides those of model, optimizer and scheduler.
DECIDING = ["data.val_fraction", "data.seed", "data.batch_size", "trainer.precision", "trainer.accumulate_grad_batches"]
DECIDING += ["trainer.gradient_clip_val", "trainer.gradient_clip_algorithm", "trainer.limit_train_batches"]
DECIDING += ["trainer.overfit_batches", "data.rotation", "data.zoom", "data.shift"]

USUAL = "lit_threeseven.LitThreeSeven"  # the network, if no other is given

# The system's errors for a full or damaged disk.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}

# Code that checks its arguments only when it is used.
LATE = ("torch.optim", "lightning.pytorch.callbacks", "lightning.pytorch.cli")

PARSER_KEY = r'Parser key "(.+?)":'

# The parser's words for a type, and a person's.
WORDS = {
    r"<class 'int'>": "a whole number",
    r"<class 'float'>": "a number",
    r"<class 'bool'>": "true or false",
    r"<class 'NoneType'>": "null",
    r"<class 'str'>": "text",
    r"dot import path string.*": "the name of a class",
    r"typing\.Literal\[(.*)\]": r"\1",
    r"tuple with (\d+) elements": r"a list of \1",
}


def check_files(args: Iterable[str]) -> None:
    """Refuse a file that is not YAML, whose aliases could multiply endlessly, or with no options in a section."""
    for path in map(Path, filter(os.path.isfile, (arg.partition("=")[2] or arg for arg in args))):
        if path.suffix not in (".yaml", ".yml", ".json"):
            continue
        try:
            text = path.read_text("utf-8")
            if sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)) > 20:
                raise ValueError("more than 20 aliases; write the values out")
            content = yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not a plain YAML file in UTF-8 ({error}).") from error
        for section in ("model", "data", "trainer"):
            if isinstance(content, dict) and not isinstance(content.get(section, {}), dict | str):
                raise UserError(f"{path}: {section} has options of its own, got {content[section]}.")


def settle(options: Namespace, work: list[str], lr_given: bool) -> None:
    """Refuse options that can't work; fill in paths, how often to validate, and the optimizer's learning rate."""
    trainer, optimizer = options.trainer, options.get("optimizer")
    for group, name in ((trainer, "default_root_dir"), (options.data, "data_dir"), (options, "ckpt_path")):
        if group[name]:
            if "://" in group[name]:
                raise UserError(f"{name} must be a local path, got {group[name]}.")
            group[name] = os.path.expandvars(Path(group[name]).expanduser())
    pictures = options.get("paths", [])
    if options.ckpt_path == "pretrained" or (pictures and not (options.ckpt_path or options.run)):
        options.ckpt_path = str(PRETRAINED / f"{options.model.class_path.rpartition('.')[2]}.ckpt")
    if not pictures and (options.get("explain") or options.get("format", "table") != "table"):
        raise UserError("--format and --explain are for pictures; give their files or folders.")
    some = ["max_epochs", "max_steps", "accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"]
    for name in (*some, *(f"limit_{part}_batches" for part in work)):
        if trainer[name] == 0:
            raise UserError(f"--trainer.{name} 0 leaves nothing to do; drop it, or give a larger number.")
    if type(trainer.val_check_interval) is not int:  # a whole number counts steps, across epochs if need be
        trainer.check_val_every_n_epoch = check_every(trainer)
    if re.match("ddp_(spawn|fork|notebook)", str(trainer.strategy)):
        raise UserError(f"--trainer.strategy {trainer.strategy} is for notebooks; use ddp.")
    if options.get("lr_scheduler") and not optimizer:
        raise UserError("--lr_scheduler needs an --optimizer to schedule, such as --optimizer SGD.")
    if optimizer and "lr" in optimizer.init_args:
        lr = optimizer.init_args.lr = optimizer.init_args.lr if lr_given else options.model.init_args.lr
        if not isinstance(lr, int | float) or not 0 < torch.tensor(lr, dtype=torch.float32) < float("inf"):
            raise UserError(f"--optimizer.lr must be a finite float32 above 0, got {lr}.")


def network(checkpoint: dict[str, Any], chosen: Namespace) -> Namespace:
    """The network that a checkpoint says it holds, for the chosen digits; the chosen one if it holds another."""
    named: Any = locate(chosen.class_path)
    kind = next((kind for kind in (named, *NETWORKS) if "network" in checkpoint and kind.saved(checkpoint)), None)
    if kind is None or named not in (LitThreeSeven, kind):
        return chosen
    known = arguments(kind, checkpoint.get("hyper_parameters", {}))
    return Namespace(
        class_path=f"{kind.__module__}.{kind.__qualname__}",
        init_args=Namespace(known | {"digits": chosen.init_args.digits}),
    )


def with_model(command: list[str]) -> list[str]:
    """Name the usual network first: a default of the parser would leave its arguments to another network."""
    subcommand, *args = command
    return command if subcommand[0] == "-" else [subcommand, f"--model={USUAL}", *args]


def check_every(trainer: Namespace) -> int:
    """Epochs from one saved checkpoint to the next: a whole fit has at most 20 unless the user says otherwise."""
    return trainer.check_val_every_n_epoch or max(1, -(-(trainer.max_epochs or 0) // 20))


def recipe(options: Namespace, model: LitThreeSeven, data: ThreeSevenDataModule) -> dict[str, Any]:
    """What decides where training ends: a run can't be resumed with anything else."""
    settings = {name: options[name] for name in DECIDING}
    settings |= {f"model.{name}": value for name, value in model.hparams.items() if name[0] != "_"}
    if "train" in vars(data):
        settings["checksum of the training images"] = zlib.crc32(data.train.tensors[0].numpy().tobytes())
    plain = model.configure_optimizers
    used = options.get("optimizer") or Namespace(class_path=type(plain()).__name__, init_args=plain().defaults)
    for kind, chosen in (("optimizer", used), ("lr_scheduler", options.get("lr_scheduler"))):
        settings[kind] = chosen and chosen.class_path.split(".")[-1]
        settings |= {f"{kind}.{name}": value for name, value in (chosen.init_args.items() if chosen else ())}
    kept = int | float | str | list | None  # a checkpoint is read without running code: no classes in it
    return {name: value if isinstance(value, kept) else str(value) for name, value in settings.items()}


def explain(error: BaseException, began: bool, given: str, ckpt_path: str) -> str | None:
    """The sentence for an error that is the user's to fix; None for one that is ours, or a signal.

    Whatever fails before training begins is the user's to fix. So are arguments that are read later, a diverging loss,
    a disk, and other processes.
    """
    text = " ".join(str(error).split())
    text = re.sub(r"^Does not validate .*? Errors: - (.*) - Expected a <class 'NoneType'> .*", r"\1", text)
    if not isinstance(error, Exception):
        return None
    if isinstance(error, UserError | FloatingPointError):
        return text
    if "unrecognized arguments" in text and not re.search("arguments: -", text):
        return f"{text}: give pictures one after another, before or after all options."
    if isinstance(error, ArgumentError):
        return f"{argument_sentence(str(error))} (`lit-threeseven fit --help` explains every option)"
    lost = isinstance(error, RuntimeError) and re.search("gloo|nccl", text, re.IGNORECASE)
    if isinstance(error, distributed.DistError) or lost:
        return (
            "The processes of this run lost contact, or not all of them started "
            f"({text.partition('. This is typically')[0][:200]}). If none of them says why, start all nodes with the "
            "same number of nodes and devices, and with the MASTER_ADDR and a free MASTER_PORT of the first."
        )
    if isinstance(error, OSError) and (error.filename or error.errno in DISK_ERRORS):
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return (
            f"{name or 'The folder of this run'} can't be used ({error.strerror}); fix that, or choose "
            "another with --trainer.default_root_dir (logs and checkpoints) or --data.data_dir (MNIST). Everything "
            "saved before is intact."
        )
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    late = frame.f_globals["__name__"].startswith(LATE)
    if began and not late and not isinstance(error, MisconfigurationException):
        return None
    if not isinstance(error, ValueError | RuntimeError | MisconfigurationException) or not text:
        text, given = f"{type(error).__name__}: {text}", f"{given} {ckpt_path}".strip()
    ours = r'\b(source|data_dir|digits|batch_size|val_fraction)="?([^\s"]*)"?'  # as our own messages name them
    reason = re.sub(ours, r"--data.\1 \2", text)
    names = re.findall(r"--(?:\w+\.)*(\w+)", given)
    return reason if re.search(rf"\b({'|'.join(names)})\b", reason) else f"{reason.rstrip('.')} (given: {given})"


def argument_sentence(message: str) -> str:
    """What the parser says of an argument, in words: "--data.batch_size must be a whole number or null, got 1.5"."""
    keys = re.findall(PARSER_KEY, message)
    unknown = re.search(r"class_path '(?:.+\.)?(\w+)':\s+Option '(.+?)' is not accepted", message)
    if unknown:
        return f"--{keys[0]}.{unknown[2]} is not an option of {unknown[1]}"
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    expected = re.findall(r"Expected an? (?!path)(.+?)(?=\. Got value|$)", message, re.MULTILINE)
    for pattern, words in WORDS.items():
        expected = [re.sub(pattern, words, kind) for kind in expected]
    if keys[1:] or keys == ["model"]:  # null would do for the whole network only, and we don't want that
        expected = [kind for kind in expected if kind != "null"]
    if not (keys and value and expected):
        refused = re.search(r"- Import path (.*)", message)
        return f"--{keys[0]}: {refused[1]}" if refused else re.sub(PARSER_KEY, r"--\1:", " ".join(message.split()))
    choices = dict.fromkeys(sorted(expected, key="null".__eq__))  # null comes last
    return f"--{'.'.join(keys)} must be {' or '.join(choices)}, got {value[1]}"


def metric_rows(metrics: dict[str, float]) -> dict[str, str]:
    """Lightning's metrics as rows for people: `test/auroc` becomes `Test AUROC`."""
    rows = {}
    for key, value in metrics.items():
        name = key.replace("/", " ").capitalize().replace("auroc", "AUROC")
        rows[name] = f"{value:.2%}" if "accuracy" in key else f"{value:.4f}"
    return rows


def silence_libraries() -> None:
    """Silence what nobody at the terminal can act on, and print other warnings on one line each."""
    warnings.formatwarning = lambda message, *_, **__: f"lit-threeseven: warning: {' '.join(str(message).split())}\n"
    # TensorBoard's writer: what stops it is raised in the main thread too
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else threading.__excepthook__(args)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "LeafSpec.*is deprecated",
        ".*torch.jit.trace.* is deprecated",  # by which TensorBoard's writer traces the graph
        "smaller than the logging interval",  # a full batch is one batch per epoch
        "configure_optimizers` will be overridden",  # by --optimizer, as asked for
        "callbacks used to create the checkpoint need to be provided",  # not to test or predict
        "across ranks is zero",  # val_fraction=0
        "was called before the ``update`` method",  # a process without a share
        "Checkpoint directory .* exists and is not empty",  # a resumed run
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")
