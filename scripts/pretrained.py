"""Train the networks that ship with the package, to the same bits each time.

python scripts/pretrained.py            write them into the package (some minutes)
python scripts/pretrained.py --check    compare the shipped networks with newly trained ones

The single layer gives the same bits on any machine. For hidden layers, this script makes results independent of the
processor: one thread, and only the basic instructions in torch and MKL.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from typing import Any

import torch

from lit_threeseven.networks import load
from lit_threeseven.weights import PRETRAINED, read

RECIPES = {
    "LitThreeSeven": [],
    "LitThreeSevenMLP": ["--config", "deep"],
}
# for results that don't depend on the processor
SAME = {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


def train(name: str, *options: str) -> dict[str, Any]:
    """Train one of `RECIPES`, with more command line options; return the part of its checkpoint that is shipped."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lit_threeseven", *RECIPES[name], f"--trainer.default_root_dir={folder}"]
        subprocess.run([*command, *options], check=True, env=os.environ | SAME, stdout=subprocess.DEVNULL)
        made = read(f"{folder}/logs/version_0/checkpoints/best.ckpt")
    arguments = {key: value for key, value in made["hyper_parameters"].items() if not key.startswith("_")}
    about = {"network": name, "hyper_parameters": arguments, "pytorch-lightning_version": "2.6.0"}  # for its format
    return about | {"state_dict": made["state_dict"]}


def main() -> int:
    """Write or check the networks; the exit code is 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    parser.add_argument("--network", choices=RECIPES, help="only this one")
    args = parser.parse_args()
    same = True
    for name in [args.network] if args.network else RECIPES:
        made, path = train(name), PRETRAINED / f"{name}.ckpt"
        if not args.check:
            torch.save(made, path)
        shipped = load(path)
        as_shipped = all(torch.equal(value, made["state_dict"][key]) for key, value in shipped.state_dict().items())
        same &= as_shipped
        print(f"{shipped.digest()}  {path.name}  {'as shipped' if as_shipped else 'DIFFERS'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
