"""Check that training on several devices gives the same results as on one.

    python scripts/verify_devices.py                                       # this machine's GPUs, or CPU processes
    python scripts/verify_devices.py --devices 2 3 4 --accelerator cpu
    python scripts/verify_devices.py --launch 'srun -N 2 python'           # through SLURM, from a shared folder

Each line of the table compares a recipe on several devices with the same recipe on one device of this machine. The exit
code is 0 if all differences are within the tolerances, otherwise 1.
"""

import argparse
import csv
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TRAIN = Path(__file__).with_name("train.py")
RECIPES = {"one batch": "null", "batches of 4,000": "4000"}
WEIGHTS_TOLERANCE = 1e-5  # largest difference, relative to the largest weight
METRICS_TOLERANCE = 1e-6  # largest difference of any logged value and of any predicted probability


def run(launch: list[str], folder: Path, options: list[str]) -> dict[str, object]:
    """Train, test and predict; returns the weights, the logged values and the predictions."""
    place = ["--trainer.default_root_dir", str(folder)]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    for command in (options, ["predict", "--ckpt_path", "last", *options[:4]]):
        result = subprocess.run(
            [*launch, str(TRAIN), *command, *place], capture_output=True, text=True, env=environment, check=False
        )
        if result.returncode:
            sys.exit(f"{shlex.join([*launch, str(TRAIN), *command, *place])} failed:\n{result.stderr}")
    (run_folder,) = (folder / "logs").iterdir()
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()
    with (run_folder / "checkpoints" / "last.predictions.csv").open() as file:
        rows = [[float(value) for value in row] for row in list(csv.reader(file))[1:]]
    return {
        "weights": torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"],
        "metrics": {
            (tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
        },
        "predictions": torch.tensor(rows, dtype=torch.float64),
    }


def compare(one: dict, many: dict) -> dict[str, float]:
    """The largest differences; infinite if a value is missing or appears twice."""
    weights = max(((many["weights"][k] - w).abs().max() / w.abs().max()).item() for k, w in one["weights"].items())
    same = one["metrics"].keys() == many["metrics"].keys()
    metrics = max(abs(many["metrics"][key] - value) for key, value in one["metrics"].items()) if same else float("inf")
    same = one["predictions"].shape == many["predictions"].shape
    predictions = (one["predictions"] - many["predictions"]).abs().max().item() if same else float("inf")
    return {"weights": weights, "metrics": metrics, "predictions": predictions}


def main() -> None:
    """Run, compare, and print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    parser.add_argument("--devices", type=int, nargs="+", default=[gpus] if gpus > 1 else [2, 3], metavar="N")
    parser.add_argument("--accelerator", default="auto" if gpus > 1 else "cpu", help="as for train.py")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument(
        "--launch", type=shlex.split, help="command to put before scripts/train.py, instead of --devices"
    )
    args = parser.parse_args()

    trials = {"launched": (args.launch, [])} if args.launch else {}
    trials = trials or {f"{n} devices": ([sys.executable], ["--trainer.devices", str(n)]) for n in args.devices}
    tolerances = {"weights": WEIGHTS_TOLERANCE, "metrics": METRICS_TOLERANCE, "predictions": METRICS_TOLERANCE}
    good = True
    print(f"{'recipe':18} {'trial':12} {'steps':>6} {'test images':>12}" + "".join(f"{t:>13}" for t in tolerances))
    for recipe, batch_size in RECIPES.items():
        options = ["--trainer.accelerator", args.accelerator]
        rest = ["--data.batch_size", batch_size, "--trainer.max_epochs", str(args.epochs)]
        rest += ["--trainer.log_every_n_steps", "5"]
        results = {}
        for trial, (launch, devices) in {"1 device": ([sys.executable], ["--trainer.devices", "1"]), **trials}.items():
            # processes launched on other machines need to find this folder, as they do the script
            with tempfile.TemporaryDirectory(prefix=".verify-", dir=Path.cwd() if args.launch else None) as folder:
                results[trial] = run(launch, Path(folder), [*options, *devices, *rest])
            steps = 1 + max(step for tag, step in results[trial]["metrics"] if tag == "train/loss")
            line = f"{recipe:18} {trial:12} {steps:6,} {len(results[trial]['predictions']):12,}"
            if trial != "1 device":
                differences = compare(results["1 device"], results[trial])
                bad = [name for name, value in differences.items() if not value <= tolerances[name]]
                good &= not bad
                line += "".join(f"{value:13.1e}" for value in differences.values())
                line += "   same" if not bad else f"   DIFFERENT: {', '.join(bad)}"
            print(line, flush=True)
    print("No difference." if good else "Results differ between devices.")
    sys.exit(not good)


if __name__ == "__main__":
    main()
