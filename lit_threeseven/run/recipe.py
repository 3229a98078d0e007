"""The recipe of a run: the settings that decide the weights after each step, and must stay the same on resuming."""

import zlib
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.errors import UserError
from lit_threeseven.resumable import check_weights, plain

# Options that decide the weights after each step, besides those of model, optimizer and scheduler.
DECIDING = ["data.val_fraction", "data.seed", "data.batch_size", "trainer.precision", "trainer.accumulate_grad_batches"]
DECIDING += ["trainer.gradient_clip_val", "trainer.gradient_clip_algorithm", "trainer.limit_train_batches"]
DECIDING += ["trainer.overfit_batches", "data.rotation", "data.zoom", "data.shift"]


def check(path: str, checkpoint: dict[str, Any], model: L.LightningModule, wanted: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not finite or not this network's, or that was made with other settings."""
    try:
        check_weights(model, checkpoint)
    except ValueError as error:
        raise UserError(f"{path} can't be used: {error}") from error
    for name, weight in checkpoint["state_dict"].items():
        if weight.layout != torch.strided or not weight.is_floating_point() or not weight.isfinite().all():
            raise UserError(f"{path} holds a {name} that is not a dense tensor of finite floats.")
    made_with = {"optimizer": checkpoint.get("optimizer", wanted.get("optimizer"))}
    for part, entry in (("model.", "hyper_parameters"), ("data.", "datamodule_hyper_parameters"), ("", "recipe")):
        made_with |= {part + name: value for name, value in checkpoint.get(entry, {}).items()}
    changing = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    unchanged = not any(made_with.get(f"optimizer.{name}") for name in changing)
    if unchanged and (made_with["optimizer"], wanted.get("optimizer")) == ("SGD", "GradientDescent"):
        # until release 0.1 the default was torch's SGD, whose update is the same except for rounding
        made_with["optimizer"] = "GradientDescent"
    differing = [
        f"{name} {made_with[name]} instead of {value}"
        for name, value in wanted.items()
        if name in made_with and made_with[name] not in (value, tuple(value) if isinstance(value, list) else value)
    ]
    if differing:
        raise UserError(f"{path} was made with {', '.join(differing)}; give the same settings, or another checkpoint.")


def recipe(options: Namespace, model: L.LightningModule, data: ThreeSevenDataModule) -> dict[str, Any]:
    """The settings that decide the weights after each step: a run resumes only with the same ones."""
    settings = {name: options[name] for name in DECIDING}
    given = {name: plain(value) for name, value in options.model.get("init_args", Namespace()).as_dict().items()}
    given |= dict(model.hparams)
    settings |= {f"model.{name}": value for name, value in given.items() if name[0] != "_"}
    if "train" in vars(data):
        settings["checksum of the training images"] = zlib.crc32(data.train.tensors[0].numpy().tobytes())
    used: Any = options.get("optimizer")
    if not used and type(model).configure_optimizers is LitThreeSeven.configure_optimizers:
        own: Any = model.configure_optimizers()  # a subclass's may need a running Trainer
        used = Namespace(class_path=type(own).__name__, init_args=own.defaults)
    for kind, chosen in (("optimizer", used), ("lr_scheduler", options.get("lr_scheduler"))):
        if kind == "lr_scheduler" or chosen:
            settings[kind] = chosen and chosen.class_path.split(".")[-1]
        settings |= {f"{kind}.{name}": value for name, value in (chosen.init_args.items() if chosen else ())}
    kept = (int, float, str, list, type(None))  # checkpoints are read without running code, so they hold no classes
    return {name: value if isinstance(value, kept) else str(value) for name, value in settings.items()}
