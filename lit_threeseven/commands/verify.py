"""`verify`: does training give the published bits on this machine, on one device and on several?"""

import csv
import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_threeseven.errors import UserError

PUBLISHED = Path(__file__).with_suffix(".json")
RECIPES = {
    "one batch": ["--data.batch_size", "null", "--trainer.max_epochs", "100"],
    "batches of 4,000": ["--data.batch_size", "4000", "--trainer.max_epochs", "30"],
}


def run(launch: list[str], options: list[str], folder: Path) -> dict[str, Any]:
    """Train, test and predict; return what is published: the digest, the losses, and a checksum of all other values."""
    place = ["--trainer.default_root_dir", str(folder)]
    csv_only = [{"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "logs"}}]
    logger = ["--trainer.logger", json.dumps(csv_only)]
    output = execute([*launch, "-m", "lit_threeseven", *options, *place, *logger, "--trainer.log_every_n_steps", "1"])
    execute([*launch, "-m", "lit_threeseven", "predict", "--ckpt_path", "last", *options, *place])
    with next(folder.glob("logs/*/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["step"]): float(row.pop("train/loss")) for row in rows if row["train/loss"]}
    rest = repr([sorted(row.items()) for row in rows]) + next(folder.glob("logs/*/checkpoints/*.csv")).read_text()
    return {
        "digest": output.split()[-1],
        "losses": [losses[step] for step in sorted(losses)],
        "other values": hashlib.sha256(rest.encode()).hexdigest(),
    }


def execute(command: list[str]) -> str:
    """Return what a command prints; raise a UserError with its error output if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"{shlex.join(command)} failed:\n{result.stderr}")
    return result.stdout


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """What differs, in words; empty if nothing does."""
    for step, (loss, other) in enumerate(zip(found["losses"], expected["losses"], strict=False)):
        if loss != other:
            return f"the loss of step {step}: {loss!r} instead of {other!r}"
    return ", ".join(name for name, value in expected.items() if found[name] != value)


def steps_without_waiting(accelerator: str = "cuda") -> None:
    """Train on one GPU; raise an error if a step between two log steps waits for it."""
    import lightning as L

    from lit_threeseven import LitThreeSeven, ThreeSevenDataModule

    class NoWaiting(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if trainer.global_step in range(5, 15) else "default")

    data = ThreeSevenDataModule(val_fraction=0)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator=accelerator, devices=1, max_epochs=20, callbacks=[NoWaiting()], **options)
    trainer.fit(LitThreeSeven(), data)


@dataclass
class Trial:
    """A run of one of the `RECIPES`.

    Attributes:
        recipe: Its name.
        where: Devices, or "launched".
        steps: Number of steps.
        digest: The digest of its final weights.
        difference: What differs from the published values, in words; empty if nothing does.
    """

    recipe: str
    where: str
    steps: int
    digest: str
    difference: str


def verify(
    devices: list[int] | None = None, accelerator: str | None = None, launch: str | None = None, publish: bool = False
) -> Iterator[Trial]:
    """Check that a machine or a cluster trains to the published bits.

    Each line of the table is a run, with the digest of its weights. It compares the digest, the loss of each step,
    every other logged value and every prediction with the published ones. With a GPU, it also checks that no step
    between two log steps waits for it. The exit code is 1 if anything differs.

    Args:
        devices: Numbers of devices to try, such as 1,2,4; by default one and all GPUs, or 1, 2 and 3 CPU processes.
        accelerator: As in Lightning's Trainer; by default auto with GPUs, otherwise cpu.
        launch: A command that starts Python on all devices, such as 'srun -N 2 python'; replaces devices.
        publish: Write the values to compare with, from a run on one CPU device.

    Yields:
        Each run's result when it ends.

    Raises:
        UserError: If a run fails.
    """
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    devices = devices or ([1, gpus] if gpus > 1 else [1] if gpus else [1, 2, 3])
    accelerator = accelerator or ("auto" if gpus else "cpu")
    python, on = [sys.executable], ["--trainer.accelerator", accelerator]
    trials = {f"{n} device{'s' if n > 1 else ''}": (python, [*on, "--trainer.devices", str(n)]) for n in devices}
    if launch:
        trials = {"launched": (shlex.split(launch), on)}
    if publish:
        trials = {"1 device": (python, ["--trainer.accelerator", "cpu", "--trainer.devices", "1"])}
    published = {} if publish else json.loads(PUBLISHED.read_text())
    for recipe, options in RECIPES.items():
        for where, (command, chosen) in trials.items():
            # processes launched on other machines must find this folder
            with tempfile.TemporaryDirectory(prefix=".verify-", dir=Path.cwd() if launch else None) as folder:
                found = run(command, [*options, *chosen], Path(folder))
            what = difference(found, published.setdefault(recipe, found))
            yield Trial(recipe, where, len(found["losses"]), found["digest"], what)
    if publish:
        PUBLISHED.write_text(json.dumps(published, indent=1) + "\n")
    elif torch.cuda.is_available() and accelerator != "cpu":
        steps_without_waiting()


def show(result: Iterator[Trial]) -> None:
    """Print the table and the verdict."""
    good = True
    print(f"{'recipe':18} {'trial':12} {'steps':>5}  {'digest':64}")
    for trial in result:
        good &= not trial.difference
        verdict = f"DIFFERENT: {trial.difference}" if trial.difference else "as published"
        print(f"{trial.recipe:18} {trial.where:12} {trial.steps:5}  {trial.digest}  {verdict}", flush=True)
    if not good:
        raise UserError("Bits differ from the published ones.")
    print("All bits are the published ones.")
