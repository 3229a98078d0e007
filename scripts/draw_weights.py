"""Draw the W of a checkpoint as a 28×28 picture, or the strongest units of W1 where there are hidden layers.

python scripts/draw_weights.py logs/version_0/checkpoints/best.ckpt weights.png
"""

import argparse
import sys

import torch

from lit_threeseven.watch import figures


def main() -> None:
    """Read the checkpoint and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of a run")
    parser.add_argument("picture", help="file to write, .png, .svg or .pdf")
    args = parser.parse_args()
    try:
        checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        W = next(iter(checkpoint["state_dict"].values()))
        digits = tuple(checkpoint["hyper_parameters"].get("digits", (3, 7)))
        picture = figures.weights(W, digits) if W.shape[1] == 1 else figures.units(W)
    except FileNotFoundError:
        sys.exit(f"There is no file {args.checkpoint}.")
    except Exception:  # whatever torch raises for a bad file
        sys.exit(f"{args.checkpoint} is not a lit-threeseven checkpoint, or is truncated.")
    try:
        picture.savefig(args.picture)
    except (OSError, ValueError) as error:
        sys.exit(f"The picture could not be written: {error}")


if __name__ == "__main__":
    main()
