"""Check a machine or a cluster: does training give the published bits there, on one device and on several?

    python scripts/verify_devices.py                                       # this machine's GPUs, or CPU processes
    python scripts/verify_devices.py --devices 1 2 3 4 --accelerator cpu
    python scripts/verify_devices.py --launch 'srun -N 2 python'           # through SLURM, from a shared folder

Each line of the table is a run, and ends with the digest of its weights. Compared are the digest, the loss of each
step, every other logged value and every prediction, with those in verify_devices.json. The exit code is 0 if all are
equal, otherwise 1.
"""

import argparse
import csv
import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule

TRAIN = Path(__file__).with_name("train.py")
PUBLISHED = Path(__file__).with_suffix(".json")
RECIPES = {
    "one batch": ["--data.batch_size", "null", "--trainer.max_epochs", "100"],
    "batches of 4,000": ["--data.batch_size", "4000", "--trainer.max_epochs", "30"],
}


def run(launch: list[str], options: list[str], folder: Path) -> dict[str, Any]:
    """Train, test and predict; gives what is published: the digest, the losses, and a checksum of all other values."""
    place = ["--trainer.default_root_dir", str(folder)]
    logger = [
        "--trainer.logger",
        "CSVLogger",
        "--trainer.logger.save_dir",
        str(folder),
        "--trainer.logger.name",
        "logs",
    ]
    output = execute([*launch, str(TRAIN), *options, *place, *logger, "--trainer.log_every_n_steps", "1"])
    execute([*launch, str(TRAIN), "predict", "--ckpt_path", "last", *options, *place])
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
    """What a command prints; if it fails, so does this script."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{result.stderr}")
    return result.stdout


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """In words what differs; empty if nothing does."""
    for step, (loss, other) in enumerate(zip(found["losses"], expected["losses"], strict=False)):
        if loss != other:
            return f"the loss of step {step}: {loss!r} instead of {other!r}"
    return ", ".join(name for name, value in expected.items() if found[name] != value)


def steps_without_waiting(accelerator: str = "cuda") -> None:
    """Train on one GPU, with an error if a step between two log steps waits for it."""

    class NoWaiting(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if trainer.global_step in range(5, 15) else "default")

    data = ThreeSevenDataModule(val_fraction=0)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator=accelerator, devices=1, max_epochs=20, callbacks=[NoWaiting()], **options)
    trainer.fit(LitThreeSeven(), data)


def main() -> None:
    """Run, compare, and print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    several = [1, gpus] if gpus > 1 else [1] if gpus else [1, 2, 3]
    parser.add_argument("--devices", type=int, nargs="+", default=several, metavar="N")
    parser.add_argument("--accelerator", default="auto" if gpus else "cpu", help="as for train.py")
    parser.add_argument("--launch", type=shlex.split, help="command before scripts/train.py, instead of --devices")
    parser.add_argument(
        "--publish", action="store_true", help="write verify_devices.json, from a run on one CPU device"
    )
    args = parser.parse_args()

    python, accelerator = [sys.executable], ["--trainer.accelerator", args.accelerator]
    trials = {f"{n} device{'s' * (n > 1)}": (python, [*accelerator, "--trainer.devices", str(n)]) for n in args.devices}
    if args.launch:
        trials = {"launched": (args.launch, accelerator)}
    if args.publish:
        trials = {"1 device": (python, ["--trainer.accelerator", "cpu", "--trainer.devices", "1"])}
    published = {} if args.publish else json.loads(PUBLISHED.read_text())
    good = True
    print(f"{'recipe':18} {'trial':12} {'steps':>5}  {'digest':64}")
    for recipe, options in RECIPES.items():
        for trial, (launch, devices) in trials.items():
            # processes launched on other machines need to find this folder, as they do the script
            with tempfile.TemporaryDirectory(prefix=".verify-", dir=Path.cwd() if args.launch else None) as folder:
                found = run(launch, [*options, *devices], Path(folder))
            what = difference(found, published.setdefault(recipe, found))
            good &= not what
            verdict = f"DIFFERENT: {what}" if what else "as published"
            print(f"{recipe:18} {trial:12} {len(found['losses']):5}  {found['digest']}  {verdict}", flush=True)
    if args.publish:
        PUBLISHED.write_text(json.dumps(published, indent=1) + "\n")
    elif torch.cuda.is_available() and args.accelerator != "cpu":
        steps_without_waiting()
        print("Between log steps no step waits for the GPU.")
    print("All bits are the published ones." if good else "Bits differ from the published ones.")
    sys.exit(not good)


if __name__ == "__main__":
    main()
