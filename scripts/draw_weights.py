"""Draw the W of a checkpoint as a 28×28 picture.

python scripts/draw_weights.py logs/version_0/checkpoints/best.ckpt weights.png
"""

import argparse

from lit_threeseven import LitThreeSeven, figures


def main() -> None:
    """Read the checkpoint and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint of a run")
    parser.add_argument("picture", help="file to write, .png, .svg or .pdf")
    args = parser.parse_args()
    model = LitThreeSeven.load_from_checkpoint(args.checkpoint, map_location="cpu", weights_only=True)
    figures.weights(model.W, model.digits).savefig(args.picture)


if __name__ == "__main__":
    main()
