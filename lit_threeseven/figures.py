"""Pictures as matplotlib figures: they take the tensors that they draw, and need no display.

All are opaque, so that they read the same on a light and on a dark page.
"""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_confusion_matrix,
    binary_precision_recall_curve,
    binary_roc,
)

DPI = 100
INK, LINE = "#222222", "#b2182b"
SIDE = 28


def weights(W: Tensor, digits: tuple[int, int] = (3, 7), title: str = "") -> Figure:
    """Draw `W` as an image: where ink speaks for the first digit, and where for the second.

    Args:
        W: ``(784, 1)``.
        digits: The two digits that `W` tells apart.
        title: What to write above it.

    Returns:
        A 28×28 picture in a diverging palette that is centred on zero.
    """
    first, second = digits
    picture = W.detach().cpu().reshape(SIDE, SIDE)
    limit = picture.abs().max().item() or 1.0
    figure, axes = _panel(4.4, 3.8, right=0.88, xlabel="column", ylabel="row")
    axes.set_title(title or f"W: what makes a {first}, and what a {second}", fontsize=11)
    axes.set(xticks=[0, 27], yticks=[0, 27])
    axes.imshow(picture.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    # a colour bar in the same axes, which takes half the time of one in its own
    scale = torch.linspace(limit, -limit, 100).unsqueeze(1)
    axes.imshow(scale.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(29, 30.5, 27.5, -0.5))
    for value, row in ((limit, 0), (0.0, 13.5), (-limit, 27)):
        axes.text(31, row, f"{value:+.2g}" if value else "0", va="center", fontsize=9)
    axes.text(34.5, 13.5, f"weight of the pixel  ({second} ← 0 → {first})", rotation=90, va="center", ha="center")
    axes.set(xlim=(-0.5, 30.5), ylim=(27.5, -0.5))
    axes.spines[:].set_visible(False)
    return figure


def images(x: Tensor, captions: Sequence[str], title: str, columns: int = 6) -> Figure:
    """Draw images side by side, each under its caption.

    Args:
        x: ``(N, 784)`` or ``(N, 28, 28)``, 0 to 1; dark is 1.
        captions: N of them, short; a line break makes two lines.
        title: What to write above all.
        columns: Images in a row.
    """
    x = x.detach().cpu().reshape(-1, SIDE, SIDE)
    rows = -(-len(x) // columns)
    zoom, gap, head = 3, 6, 46  # screen pixels for a pixel of the image, between images, and for the title
    caption = 6 + 13 * max(text.count("\n") + 1 for text in captions)
    width, height = columns * (SIDE * zoom + gap), rows * (SIDE * zoom + caption + gap) + head
    canvas = torch.ones(height, width)
    # pixels are put straight into the figure: axes would take longer than all else
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    for i, (image, text) in enumerate(zip(x, captions, strict=True)):
        top = head + i // columns * (SIDE * zoom + caption + gap) + caption
        left = i % columns * (SIDE * zoom + gap) + gap // 2
        enlarged = image.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
        canvas[top : top + SIDE * zoom, left : left + SIDE * zoom] = 0.9 - 0.9 * enlarged
        place = (left + SIDE * zoom / 2) / width, 1 - (top - 5) / height
        figure.text(*place, text, ha="center", va="bottom", fontsize=8, color=INK, linespacing=0.95)
    figure.figimage(canvas.flip(0).numpy(), cmap="gray", vmin=0, vmax=1, origin="lower")
    figure.text(0.5, 1 - 8 / height, title, ha="center", va="top", fontsize=11, color=INK)
    return figure


def confusion_matrix(
    probability: Tensor, y: Tensor, digits: tuple[int, int] = (3, 7), threshold: float = 0.5
) -> Figure:
    """Draw how many images of each digit are taken for which.

    Args:
        probability: Of the first digit, ``(N, 1)``, 0 to 1.
        y: Labels, ``(N, 1)``: 1 for the first digit, 0 for the second.
        digits: The two digits.
        threshold: Below it an image is the second digit, otherwise the first.
    """
    said = (probability.detach().flatten().cpu() >= threshold).int()
    counts = binary_confusion_matrix(said, y.flatten().cpu().int()).flip(0, 1)
    figure, axes = _panel(3.9, 3.6, xlabel="taken for", ylabel="is")
    wrong = int(counts.sum() - counts.trace())
    axes.set_title(f"{wrong:,} of {int(counts.sum()):,} are wrong", fontsize=11)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(2):
        for column in range(2):
            color = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, f"{int(counts[row, column]):,}", ha="center", va="center", fontsize=16, color=color)
    axes.set(xticks=[0, 1], yticks=[0, 1])
    axes.set_xticklabels(digits)
    axes.set_yticklabels(digits)
    return figure


def roc(probability: Tensor, y: Tensor, digits: tuple[int, int] = (3, 7)) -> Figure:
    """Draw the receiver operating characteristic: what is gained and what is lost as the threshold goes down.

    Args:
        probability: Of the first digit, ``(N, 1)``, 0 to 1.
        y: Labels, ``(N, 1)``: 1 for the first digit, 0 for the second.
        digits: The two digits.
    """
    first, second = digits
    false, true, _ = binary_roc(probability.detach().flatten().cpu(), y.flatten().cpu().int())
    area = torch.trapezoid(true, false).item()
    figure, axes = _panel(
        3.9, 3.6, xlabel=f"share of the {second}s taken for a {first}", ylabel=f"share of the {first}s found"
    )
    axes.set_title(f"ROC: area under the curve {area:.4f}", fontsize=11)
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    axes.plot(false.numpy(), true.numpy(), color=LINE)
    return _unit_square(figure, axes)


def precision_recall(probability: Tensor, y: Tensor, digits: tuple[int, int] = (3, 7)) -> Figure:
    """Draw the precision of the first digit over its recall, for all thresholds.

    Args:
        probability: Of the first digit, ``(N, 1)``, 0 to 1.
        y: Labels, ``(N, 1)``: 1 for the first digit, 0 for the second.
        digits: The two digits.
    """
    first = digits[0]
    precision, recall, _ = binary_precision_recall_curve(probability.detach().flatten().cpu(), y.flatten().cpu().int())
    figure, axes = _panel(
        3.9,
        3.6,
        xlabel=f"recall: share of the {first}s found",
        ylabel="precision",
    )
    axes.set_title(f"Precision and recall of the {first}s", fontsize=11)
    axes.plot(recall.numpy(), precision.numpy(), color=LINE)
    return _unit_square(figure, axes)


def curve(x: Tensor, y: Tensor, title: str, xlabel: str, ylabel: str, xscale: str = "linear") -> Figure:
    """Draw a line.

    Args:
        x: ``(N,)``.
        y: ``(N,)``.
        title: What to write above it.
        xlabel: What `x` is.
        ylabel: What `y` is.
        xscale: "linear" or "log".
    """
    figure, axes = _panel(4.6, 3.4, bottom=0.16, xlabel=xlabel, ylabel=ylabel, xscale=xscale)
    axes.set_title(title, fontsize=11)
    axes.plot(x.detach().cpu().numpy(), y.detach().cpu().numpy(), color=LINE)
    axes.grid(color="#dddddd")
    return figure


def numbers(image: Tensor, title: str) -> Figure:
    """Draw an image as the numbers that it is made of, shaded by value.

    Args:
        image: ``(28, 28)`` uint8, 0 to 255.
        title: What to write above it.
    """
    figure, axes = _panel(9.6, 9.6, left=0.05, bottom=0.05, xlabel="column", ylabel="row")
    axes.set_title(title, fontsize=13)
    axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=255)
    for row, values in enumerate(image.tolist()):
        for column, value in enumerate(values):
            color = "white" if value > 127 else "#999999" if value == 0 else INK
            axes.text(column, row, str(value), ha="center", va="center", fontsize=6.5, color=color)
    return figure


def _panel(
    width: float, height: float, left: float = 0.15, bottom: float = 0.13, right: float = 0.96, **labels: str
) -> tuple[Figure, Axes]:
    """One pair of axes in fixed places, which takes half the time of having them laid out."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((left, bottom, right - left - 0.02, 0.89 - bottom))
    axes.set(**labels)
    return figure, axes


def _unit_square(figure: Figure, axes: Axes) -> Figure:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=[0, 1], yticks=[0, 1])
    axes.grid(color="#dddddd")
    return figure
