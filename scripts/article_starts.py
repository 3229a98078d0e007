"""Run the article's recipe from many random starts, print where each one ends, and draw all of them.

    python scripts/article_starts.py --starts 64 --picture starts.png

Start k is the same as with `lit-threeseven --config article --seed_everything k`. All starts train in one sweep.
"""

import argparse
import tempfile

import torch

from lit_threeseven.commands.sweep import sweep
from lit_threeseven.watch import figures

ARTICLE = 0.6805  # the loss that the article prints


def main() -> None:
    """Train all starts at once and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=64, help="number of random starts (default: 64)")
    parser.add_argument("--epochs", type=int, default=2000, help="full-batch epochs (default: 2000)")
    parser.add_argument("--picture", metavar="FILE", help="file for a picture of all losses, .png, .svg or .pdf")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _, table = sweep([0.001], [1.0], args.starts, args.epochs, val_fraction=0, out=folder)
    print("seed    loss  training accuracy")
    for row in table:
        print(f"{row['seed']:4}  {row['train_loss']:.4f}  {row['train_accuracy']:.1%}")
    losses, accuracies = (torch.tensor([row[name] for row in table]) for name in ("train_loss", "train_accuracy"))
    print(
        f"\nloss from {losses.min():.4f} to {losses.max():.4f}, median {losses.quantile(0.5):.4f}; "
        f"median training accuracy {accuracies.quantile(0.5):.1%}; {int((losses >= ARTICLE).sum())} of {args.starts} "
        f"starts end at or above the article's {ARTICLE}"
    )
    if args.picture:
        figures.losses(losses, ARTICLE).savefig(args.picture)


if __name__ == "__main__":
    main()
