"""Draw the W of a checkpoint as a 28×28 picture.

python scripts/draw_weights.py logs/version_0/checkpoints/best.ckpt weights.png
"""

import argparse
import sys

from lit_threeseven import LitThreeSeven
from lit_threeseven.watch import figures


def main() -> None:
    """Read the checkpoint and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of a run")
    parser.add_argument("picture", help="file to write, .png, .svg or .pdf")
    args = parser.parse_args()
    try:
        model = LitThreeSeven.load_from_checkpoint(args.checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"There is no file {args.checkpoint}.")
    except Exception:  # whatever torch or Lightning raises for a bad file
        sys.exit(f"{args.checkpoint} is not a lit-threeseven checkpoint, or is truncated.")
    try:
        figures.weights(model.W, model.digits).savefig(args.picture)
    except (OSError, ValueError) as error:
        sys.exit(f"The picture could not be written: {error}")


if __name__ == "__main__":
    main()
