"""Run the article's recipe from many random starts and print where each one ends.

    python scripts/article_starts.py --starts 8

The starts are columns of one W, so one matrix product serves them all. Start k is the same as with
`lit-threeseven --config scripts/configs/article.yaml --seed_everything k`.
"""

import argparse

import torch

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.functional import sigmoid
from lit_threeseven.module import THRESHOLD
from lit_threeseven.pixels import flatten

EPOCHS, LR, INIT_STD = 2000, 0.001, 1.0


def main() -> None:
    """Train all starts at once and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=64, help="number of random starts (default: 64)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"full-batch epochs (default: {EPOCHS})")
    args = parser.parse_args()

    data = ThreeSevenDataModule(val_fraction=0)
    data.setup("fit")
    images, y = data.train.tensors
    x = flatten(images)

    models = []
    for seed in range(args.starts):
        torch.manual_seed(seed)
        models.append(LitThreeSeven(LR, INIT_STD))
    W = torch.cat([model.W for model in models], dim=1).detach().requires_grad_()
    b = torch.cat([model.b for model in models]).detach().requires_grad_()

    for _ in range(args.epochs):
        probability = sigmoid(x @ W + b)
        losses = ((probability - y) ** 2).mean(0)
        gradients = torch.autograd.grad(losses.sum(), (W, b))
        with torch.no_grad():
            for parameter, gradient in zip((W, b), gradients, strict=True):
                parameter -= LR * gradient

    accuracies = ((probability >= THRESHOLD) == y.bool()).float().mean(0)
    print("seed    loss  training accuracy")
    for seed, (loss, accuracy) in enumerate(zip(losses.tolist(), accuracies.tolist(), strict=True)):
        print(f"{seed:4}  {loss:.4f}  {accuracy:.1%}")
    print(
        f"\nloss from {losses.min():.4f} to {losses.max():.4f}, median {losses.quantile(0.5):.4f}; "
        f"median training accuracy {accuracies.quantile(0.5):.1%}; {int((losses >= 0.6805).sum())} of {args.starts} "
        "starts end at or above the article's 0.6805"
    )


if __name__ == "__main__":
    main()
