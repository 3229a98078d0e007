"""Draw the W of a checkpoint as a 28×28 picture, or the strongest units of W1 if there are hidden layers.

python scripts/draw_weights.py logs/version_0/checkpoints/best.ckpt weights.png
"""

import argparse
import sys

from lit_threeseven.networks import load
from lit_threeseven.watch import figures


def main() -> None:
    """Read the checkpoint and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of a run")
    parser.add_argument("picture", help="file to write, .png, .svg or .pdf")
    args = parser.parse_args()
    try:
        model = load(args.checkpoint)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    W = next(model.parameters())
    picture = figures.weights(W, model.digits) if W.shape[1] == 1 else figures.units(W)
    try:
        picture.savefig(args.picture)
    except (OSError, ValueError) as error:
        sys.exit(f"The picture could not be written: {error}")


if __name__ == "__main__":
    main()
