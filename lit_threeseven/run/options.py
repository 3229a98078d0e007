"""Check and complete options; turn the user's mistakes into sentences, and metrics into rows."""

import errno
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import instantiate_class
from torch import distributed

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.errors import UserError, check_positive
from lit_threeseven.networks import NETWORKS
from lit_threeseven.resumable import arguments, check_class, full_name, saved
from lit_threeseven.weights import PRETRAINED

PARSER_KEY = r'Parser key "(.+?)":'

# The parser's words for a type, and plain ones.
WORDS = {
    r"<class 'int'>": "a whole number",
    r"<class 'float'>": "a number",
    r"<class 'bool'>": "true or false",
    r"<class 'NoneType'>": "null",
    r"<class 'str'>": "text",
    r"<class 'list'>": "a list, such as [20, 10]",
    r"<class 'collections.abc.Iterable'>": "a list",
    r"<class 'tuple'>( with 2 elements)?": "a list of 2, such as [3, 7]",
    r"tuple with (\d+) elements": r"a list of \1",
    r"dot import path string.*": "the name of a class",
    r"typing\.Literal\[(.*)\]": r"\1",
}

CHECKS = 20  # a fit validates and saves at most this often, unless the user says otherwise


def with_model(command: list[str]) -> list[str]:
    """Put the default network first, so that --model replaces it.

    If it were the parser's default, the network that replaces it would get its arguments.
    """
    subcommand, *args = command
    if args[-1:] == ["--model.help"]:
        args.append("LitThreeSeven")
    return command if subcommand[0] == "-" else [subcommand, "--model=lit_threeseven.LitThreeSeven", *args]


def settle(options: Namespace, work: list[str]) -> None:
    """Refuse options that can't work, and expand paths."""
    trainer = options.trainer
    for group, name in ((trainer, "default_root_dir"), (options.data, "data_dir"), (options, "ckpt_path")):
        if group[name]:
            if "://" in group[name]:
                raise UserError(f"{name} must be a local path, got {group[name]}.")
            group[name] = os.path.expandvars(Path(group[name]).expanduser())
    if options.ckpt_path == "pretrained":
        options.ckpt_path = str(PRETRAINED / f"{options.model.class_path.rpartition('.')[2]}.ckpt")
    if type(options.seed_everything) is int and not 0 <= options.seed_everything < 2**32:
        raise UserError(f"--seed_everything must be from 0 to 4294967295, got {options.seed_everything}.")
    some = ["max_epochs", "max_steps", "accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"]
    for name in (*some, *(f"limit_{part}_batches" for part in work)):
        if trainer[name] == 0:
            raise UserError(f"--trainer.{name} 0 leaves nothing to do; drop it, or give a larger number.")
    if re.match("ddp_(spawn|fork|notebook)", str(trainer.strategy)):
        raise UserError(f"--trainer.strategy {trainer.strategy} is for notebooks; use ddp.")
    optimizer = options.get("optimizer")
    if options.get("lr_scheduler") and not optimizer:
        raise UserError("--lr_scheduler needs an --optimizer to schedule, such as --optimizer SGD.")
    if optimizer:
        check_positive(**{"--optimizer.lr": optimizer.init_args.get("lr", 1.0)})


def listed(value: Any) -> Any:
    """A value as YAML gives it: a list instead of a tuple."""
    return list(value) if isinstance(value, tuple) else value


def adopt(chosen: Namespace, checkpoint: dict[str, Any]) -> None:
    """Choose the network of a checkpoint, with its arguments.

    Arguments that name classes stay as the command line gives them, since a checkpoint must not import anything. The
    network's class changes only from `LitThreeSeven`, the default, to another one of this package.

    Raises:
        UserError: If the command line gives other arguments, or names another network.
    """
    asked: Any = locate(chosen.class_path)  # the parser has imported it
    kind = next((kind for kind in NETWORKS if saved(kind, checkpoint)), asked) if asked is LitThreeSeven else asked
    check_class(kind, checkpoint)
    given = chosen.get("init_args", Namespace()).as_dict()
    kept = arguments(kind, checkpoint.get("hyper_parameters", {}))
    kept = {name: value for name, value in kept.items() if "class_path" not in repr(value)}
    usual = {name: parameter.default for name, parameter in signature(asked).parameters.items()}
    for name in given.keys() & kept.keys():
        value, default, other = map(listed, (given[name], usual.get(name), kept[name]))
        if value not in (default, other):
            raise UserError(f"The checkpoint has model.{name} {other}, not {value}; drop that option.")
    if kind is not asked:
        given = {}
    chosen.class_path, chosen.init_args = full_name(kind), Namespace(given | kept)


def check_every(trainer: Namespace, data: ThreeSevenDataModule) -> dict[str, Any]:
    """The Trainer's arguments that make it validate at most `CHECKS` times in a fit, unless the user says otherwise."""
    if type(trainer.val_check_interval) is int or trainer.check_val_every_n_epoch:  # an int counts steps
        return {"check_val_every_n_epoch": trainer.check_val_every_n_epoch}
    limits = [trainer.max_epochs] if (trainer.max_epochs or 0) > 0 else []
    if trainer.max_steps > 0:
        steps = 1
        if data.batch_size:
            data.setup("fit")
            steps = max(1, len(data.train_dataloader()) // (trainer.accumulate_grad_batches or 1))
        limits.append(trainer.max_steps // steps)
    if trainer.max_time and not limits and trainer.val_check_interval is None:
        from lightning.pytorch.callbacks import Timer

        seconds = Timer(trainer.max_time).time_remaining() or 0
        return {"val_check_interval": {"seconds": seconds / CHECKS}, "check_val_every_n_epoch": 1}
    return {"check_val_every_n_epoch": max(1, -(-min(limits, default=100 * CHECKS) // CHECKS))}


@contextmanager
def from_the_command_line(command: list[str]) -> Iterator[None]:
    """Turn any error into a UserError, where objects are built from the user's options."""
    try:
        yield
    except MisconfigurationException:
        raise
    except Exception as error:  # classes raise errors of any kind
        text = " ".join(str(error).split())
        built = re.match(r"Does not validate .*? Errors: - (.*?) - Expected a <class ", text)
        if isinstance(error, UserError) or built:  # the parser keeps only the text of an error
            raise UserError(built[1] if built else text) from error
        raise UserError(f"{type(error).__name__}: {text.rstrip('.')} (given: {' '.join(command[1:])})") from error


def try_out(options: Namespace, model: LightningModule, trainer: Any, command: list[str]) -> None:
    """Try the chosen optimizer on a weight made for this, and the scheduler for all epochs, 10,000 at most.

    Raises:
        UserError: If that fails, or a callback watches a metric that the usual networks don't log.
    """
    logged = [f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "accuracy", "auroc")]
    for callback in trainer.callbacks:
        watched = getattr(callback, "monitor", None)
        if type(model) in NETWORKS and watched and watched not in logged:
            raise UserError(f"{type(callback).__name__} monitors {watched}; there are {', '.join(logged)}.")
    optimizer, scheduler = options.get("optimizer"), options.get("lr_scheduler")
    if optimizer:
        with from_the_command_line(command), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weight = torch.nn.Parameter(torch.zeros(2, 1))
            weight.grad = torch.zeros(2, 1)
            steps = instantiate_class(([weight],), optimizer.as_dict())
            steps.step(lambda: weight.sum())
            if scheduler and "monitor" not in scheduler.init_args:
                rates = instantiate_class(steps, scheduler.as_dict())
                for _ in range(min(trainer.max_epochs or 1, 10_000)):
                    rates.step()


def sentence(error: BaseException, command: list[str], processes: int) -> str | None:
    """The sentence for an error that the user can fix; None for a mistake of ours, or a signal."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | MisconfigurationException):
        return text
    if isinstance(error, ArgumentError):
        return f"{parsers(str(error))} (`lit-threeseven {command[0]} --help` explains every option)"
    if isinstance(error, distributed.DistError) or (
        processes > 1 and isinstance(error, RuntimeError) and re.search("gloo|nccl", text, re.IGNORECASE)
    ):
        return (
            "The processes of this run lost contact, or not all of them started "
            f"({text.partition('. This is typically')[0][:200]}). If none of them says why, start all nodes with the "
            "same number of nodes and devices, and with the MASTER_ADDR and a free MASTER_PORT of the first node."
        )
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    if isinstance(error, OSError) and (error.filename or error.errno in full):
        name = os.fsdecode(error.filename or "The folder of this run")
        return (
            f"{name} can't be used ({error.strerror}); fix that, or choose "
            "another with --trainer.default_root_dir (logs and checkpoints) or --data.data_dir (MNIST). Everything "
            "saved before is intact."
        )
    return None


def parsers(message: str) -> str:
    """The parser's message in plain words: "--data.batch_size must be a whole number or null, got 1.5"."""
    keys = re.findall(PARSER_KEY, message)
    problem = re.search(r"class_path '(.+)':\s+(.+)", message)
    name, what = problem.groups() if problem else ("", "")
    wrong = re.match(r"Option '(.+?)' is not accepted", what)
    if wrong:
        return f"--{keys[0]}.{wrong[1]} is not an option of {name.split('.')[-1]}{meant(wrong[1])}"
    lacking = re.match(r"the following arguments are required: (.+)", what)
    if lacking:
        return f"{name.split('.')[-1]} needs {lacking[1]}, as in --{keys[0]}.{lacking[1].split(',')[0]} …"
    failed = (
        [what] if what and not keys[1:] else re.findall(r"^ +- (?!Expected|Does not|Problem|Parser)(.+)", message, re.M)
    )
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    if failed and value:  # importing or building the class failed
        return f"--{keys[0]} {name or value[1]}: {failed[0]}"
    expected = re.findall(r"Expected (?:an? (?!path)|(?=<))(.+?)(?=\. Got value|$)", message, re.MULTILINE)
    for pattern, words in WORDS.items():
        expected = [re.sub(pattern, words, kind) for kind in expected]
    if keys[1:] or keys == ["model"]:  # null could only replace the whole network, which is no use
        expected = [kind for kind in expected if kind != "null"]
    if keys and value and expected:
        choices = dict.fromkeys(sorted(expected, key="null".__eq__))  # null comes last
        return f"--{'.'.join(keys)} must be {' or '.join(choices)}, got {value[1]}"
    text = re.sub(PARSER_KEY, r"--\1:", " ".join(message.split()))
    unknown = re.search(r"(?:unrecognized arguments|ambiguous option): (\S+)", text)
    if unknown and unknown[1] in ("fit", "validate", "test", "predict"):
        return f"{unknown[1]} comes first: lit-threeseven {unknown[1]} --config …"
    return text + (meant(unknown[1]) if unknown else "")


def meant(option: str) -> str:
    """For an unknown option, "; did you mean …?" with the most similar one of model, data or Trainer; or nothing."""
    groups = {"model": LitThreeSeven, "data": ThreeSevenDataModule, "trainer": Trainer}
    names = {name: f"--{group}.{name}" for group, kind in groups.items() for name in signature(kind).parameters}
    name = re.split(r"[.]|--", option.partition("=")[0])[-1].replace("-", "_")
    near = get_close_matches(name, names, 1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def metric_rows(metrics: dict[str, float]) -> dict[str, str]:
    """Lightning's metrics as rows of a table: `test/auroc` becomes `Test AUROC`."""
    rows = {}
    for key, value in metrics.items():
        name = key.replace("/", " ").capitalize().replace("auroc", "AUROC")
        rows[name] = f"{value:.2%}" if "accuracy" in key else f"{value:.4f}"
    return rows
