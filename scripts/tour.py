# %% [markdown]
# # Three or seven, step by step
#
# This tour goes through the smallest neural network there is, from bytes in a file to a trained `W`, with the functions
# of `lit_threeseven`. It opens as a notebook in VS Code, and in Jupyter with Jupytext. It also runs as a script, which
# writes its pictures to the folder `tour`:
#
#     python scripts/tour.py --out tour

# %%
import argparse
import logging
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from matplotlib.figure import Figure

from lit_threeseven import LitThreeSeven, ThreeSevenDataModule
from lit_threeseven.dataset import BUNDLED_ROOT, load
from lit_threeseven.functional import mean_squared_error, scale, sigmoid
from lit_threeseven.module import THRESHOLD
from lit_threeseven.watch import figures

parser = argparse.ArgumentParser(description="Go through the network step by step, and write the pictures.")
parser.add_argument("--out", type=Path, default=Path("tour"), help="folder for the pictures (default: tour)")
args, _ = parser.parse_known_args()  # a notebook has its own arguments
args.out.mkdir(parents=True, exist_ok=True)

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def show(figure: Figure, name: str) -> None:
    """Write a picture, and show it in a notebook."""
    path = args.out / f"{name}.png"
    figure.savefig(path)
    print(f"picture: {path}")
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(path))


def draw_curve(
    x: torch.Tensor, y: torch.Tensor, title: str, xlabel: str, ylabel: str, xscale: str = "linear"
) -> Figure:
    """Draw a line through N points, ``(N,)`` each."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel, xscale=xscale)
    axes.plot(x.numpy(), y.numpy(), color=figures.LINE)
    axes.grid(color="#dddddd")
    return figure


def draw_numbers(image: torch.Tensor, title: str) -> Figure:
    """Draw an image, ``(28, 28)`` uint8, as its numbers, shaded by value."""
    figure = Figure(figsize=(9.6, 9.6), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="column", ylabel="row")
    axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=255)
    for row, values in enumerate(image.tolist()):
        for column, value in enumerate(values):
            color = "white" if value > 127 else "#999999" if value == 0 else figures.INK
            axes.text(column, row, str(value), ha="center", va="center", fontsize=6.5, color=color)
    return figure


# %% [markdown]
# ## The data
#
# MNIST's threes and sevens, in MNIST's order: bytes, 28 rows by 28 columns, 0 for paper and 255 for ink.

# %%
images, labels = load(BUNDLED_ROOT, digits=(3, 7), train=True)
test_images, test_labels = load(BUNDLED_ROOT, digits=(3, 7), train=False)
threes, sevens = images[labels.squeeze(1) == 1], images[labels.squeeze(1) == 0]
print(f"threes {tuple(threes.shape)}, sevens {tuple(sevens.shape)}, {images.dtype}, {images.min()} to {images.max()}")
print(f"test set: {int(test_labels.sum()):,} threes and {int((1 - test_labels).sum()):,} sevens")

some = torch.cat([threes[:6], sevens[:6]])
show(figures.images(some / 255, ["3"] * 6 + ["7"] * 6, "Threes and sevens"), "digits")

# %% [markdown]
# An image is a grid of numbers. Shaded by value, they show the digit.

# %%
show(draw_numbers(threes[0], "The first three: 28 × 28 numbers from 0 to 255"), "numbers")

# %% [markdown]
# ## Rows and labels
#
# The network takes an image as one row of 784 numbers from 0 to 1. Its label is 1 for a three and 0 for a seven.

# %%
x, y = scale(images).flatten(1), labels
print(
    f"x {tuple(x.shape)}, {x.dtype}, {x.min():.0f} to {x.max():.0f}; "
    f"y {tuple(y.shape)}, its first labels {y[:8, 0].int().tolist()}"
)
print(f"{(x == 0).float().mean():.1%} of the pixels are paper")

# %% [markdown]
# ## The sigmoid
#
# It squashes any number into a probability: 0 becomes one half, large numbers nearly 1, small ones nearly 0.

# %%
numbers = torch.linspace(-6, 6, 241)
show(draw_curve(numbers, sigmoid(numbers), "sigmoid(z) = 1 / (1 + exp(-z))", "z", "sigmoid(z)"), "sigmoid")

# %% [markdown]
# ## One prediction by hand
#
# `W` has one weight for each pixel, and `b` is one number. At the start both are small and random. The prediction is
# the sigmoid of the matrix product of the row with `W`, plus `b`.

# %%
L.seed_everything(0, verbose=False)
model = LitThreeSeven(lr=1.0, init_std=0.01)
W, b = model.W.detach().clone().requires_grad_(), model.b.detach().clone().requires_grad_()

by_hand = sum(x[0, i] * W[i, 0] for i in range(784)) + b[0]
product = x[:1] @ W + b
print(f"summed pixel by pixel {by_hand.item():.6f}, as a matrix product {product.item():.6f}")
print(f"its sigmoid {sigmoid(product).item():.6f}, the module's output {model(x[:1]).item():.6f}")
torch.testing.assert_close(sigmoid(by_hand), model(x[:1])[0, 0], rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## The loss
#
# The loss says how wrong the predictions for all images are: it is the mean of the squared differences from the labels.
# If every prediction is one half, the loss is 0.25.

# %%
prediction = sigmoid(x @ W + b)
loss = mean_squared_error(prediction, y)
print(f"predictions {tuple(prediction.shape)}, from {prediction.min():.3f} to {prediction.max():.3f}; loss {loss:.4f}")

# %% [markdown]
# ## One step of gradient descent
#
# `loss.backward()` computes the slope of the loss along each weight: `W.grad`. A step against the slope makes the loss
# smaller. As a formula, the slope is the product of the transposed rows with `2 (p - y) p (1 - p) / N`. The Trainer
# takes the same step.

# %%
loss.backward()
with torch.no_grad():
    p = prediction
    by_formula = x.T @ (2 * (p - y) * p * (1 - p) / len(y))
    print(f"W.grad {tuple(W.grad.shape)}, largest {W.grad.abs().max():.4f}")
    print(f"largest difference from the formula {(W.grad - by_formula).abs().max():.1e}")
    torch.testing.assert_close(by_formula, W.grad, rtol=1e-4, atol=1e-6)
    W -= model.lr * W.grad
    b -= model.lr * b.grad
    print(f"loss after the step {mean_squared_error(sigmoid(x @ W + b), y):.4f}")

quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
data = ThreeSevenDataModule(val_fraction=0)
L.Trainer(accelerator="cpu", max_epochs=1, **quiet).fit(model, data)
print(f"largest difference from the Trainer's step {(model.W - W).abs().max():.1e}")
torch.testing.assert_close(model.W.detach(), W.detach(), rtol=1e-4, atol=1e-6)

# %% [markdown]
# ## Training
#
# The same step, 2,000 times.


# %%
class Losses(L.Callback):
    """Keep the loss of every epoch."""

    def __init__(self) -> None:
        self.values = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep it."""
        self.values.append(trainer.callback_metrics["train/loss"])


L.seed_everything(0, verbose=False)
model, losses = LitThreeSeven(), Losses()
trainer = L.Trainer(accelerator="cpu", max_epochs=2000, log_every_n_steps=1, callbacks=[losses], **quiet)
trainer.fit(model, data)
values = torch.stack(losses.values)
for epochs in (1, 10, 100, 1000, 2000):
    print(f"loss at epoch {epochs:5,}: {values[epochs - 1]:.4f}")

steps = torch.arange(1, len(values) + 1)
show(draw_curve(steps, values, "The loss goes down", "epoch", "loss", xscale="log"), "loss")

# %% [markdown]
# ## What it has learnt
#
# `W` as a picture: ink on red favours a three, ink on blue a seven.

# %%
show(figures.weights(model.W), "W")

# %% [markdown]
# ## How good it is, and the threshold
#
# Below a probability of one half the answer is a seven, otherwise a three. These are test images, which the network has
# never seen.

# %%
with torch.no_grad():
    probability = model(test_images / 255)
right = (probability >= THRESHOLD) == test_labels.bool()
print(f"{int(right.sum()):,} of {len(right):,} test images are right: {right.float().mean():.2%}")
show(figures.quality("confusion_matrix", probability, test_labels), "confusion_matrix")

# %% [markdown]
# The images closest to the threshold: a little more or less ink would change the answer.

# %%
closest = (probability - THRESHOLD).abs().squeeze(1).argsort()[:12]
captions = []
for i in closest.tolist():
    answer = "3" if probability[i] >= THRESHOLD else "7"
    captions.append(f"{probability[i].item():.2f}: a {answer}\n{'right' if right[i] else 'wrong'}")
show(figures.images(test_images[closest] / 255, captions, "Closest to the threshold of 0.5"), "threshold")
