"""Pictures as opaque matplotlib figures, from tensors of any floating-point type; no display is needed."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics.functional.classification import binary_confusion_matrix, binary_precision_recall_curve, binary_roc

from lit_threeseven.functional import THRESHOLD

Kind = Literal["confusion_matrix", "roc", "precision_recall"]
INK, LINE = "#222222", "#b2182b"


def weights(W: Tensor, digits: tuple[int, int] = (3, 7), name: str = "W") -> Figure:
    """Draw where ink favours the first digit and where the second, in a palette centred on zero.

    Args:
        W: ``(784, 1)``.
        digits: The two digits that `W` tells apart.
        name: Its name in the title.
    """
    first, second = digits
    picture = W.detach().float().cpu().reshape(28, 28)
    limit = picture.abs().max().item() or 1.0
    figure, axes = _panel(4.6, f"{name}: red for {first}, blue for {second}", "column", "row")
    axes.set(xticks=[0, 27], yticks=[0, 27], anchor="W")
    # the colour bar is part of the picture: separate axes would take as long as everything else
    bar = torch.linspace(limit, -limit, 28).unsqueeze(1).expand(28, 2)
    axes.imshow(torch.cat([picture, torch.zeros(28, 1), bar], dim=1).numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    for value, row in ((limit, 0), (0.0, 13.5), (-limit, 27)):
        axes.text(31.5, row, f"{value:.2g}", va="center")
    axes.text(36.5, 13.5, f"weight of the pixel  ({second} ← 0 → {first})", rotation=90, va="center")
    axes.spines[:].set_visible(False)
    return figure


def units(W: Tensor, name: str = "W1") -> Figure:
    """Draw the units with the largest weights, at most 24: ink on red raises a unit's value, ink on blue lowers it.

    Args:
        W: ``(784, K)``, of K units.
        name: Its name in the title.
    """
    rows = W.detach().float().cpu().t()
    strongest = rows.norm(dim=1).topk(min(24, len(rows))).indices.sort().values
    figure = Figure(figsize=(6.2, 0.8 * -(-len(strongest) // 8) + 0.5), facecolor="white")
    pictures = rows[strongest] / rows[strongest].abs().amax(1, keepdim=True).clamp(min=1e-12)
    tiles = pad(pictures.reshape(-1, 28, 28), (1, 1, 1, 1, 0, -len(strongest) % 8))
    canvas = tiles.unflatten(0, (-1, 8)).transpose(1, 2).reshape(-1, 240)
    axes = figure.add_axes((0, 0, 1, 1 - 0.4 / figure.get_figheight()))
    axes.imshow(canvas.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"{name}: the {len(strongest)} strongest of {len(rows)} units", fontsize=11, color=INK)
    return figure


def images(x: Tensor, captions: Sequence[str], title: str) -> Figure:
    """Draw images, four in a row, each under a caption large enough for TensorBoard's small cards.

    Args:
        x: ``(N, 784)`` or ``(N, 28, 28)``, 0 to 1; dark is 1.
        captions: N short ones, of one or two lines.
        title: Text above the images.
    """
    rows = -(-len(x) // 4)
    paper = 0.1 + 0.9 * x.detach().float().cpu().reshape(-1, 28, 28)
    tiles = pad(paper, (1, 1, 11, 1, 0, 4 * rows - len(x)))  # to 40 × 30 pixels, as many as there is room for
    canvas = tiles.unflatten(0, (rows, 4)).transpose(1, 2).reshape(40 * rows, 120)
    # the same axes for all images: separate ones would take longer than everything else
    figure = Figure(figsize=(3.6, 1.2 * rows + 0.4), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1.2 * rows / (1.2 * rows + 0.4)))
    axes.imshow(canvas.numpy(), cmap="gray_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_axis_off()
    for i, text in enumerate(captions):
        axes.text(30 * (i % 4) + 14.5, 40 * (i // 4) + 9.5, text, ha="center", fontsize=8, color=INK, linespacing=0.95)
    axes.set_title(title, fontsize=9, color=INK)
    return figure


def contributions(
    x: Tensor,
    parts: Tensor,
    title: str,
    digits: tuple[int, int] = (3, 7),
    b: float | None = None,
    picture: Any = None,
    box: tuple[int, int, int, int] | None = None,
) -> Figure:
    """Draw an image, and beside it what each pixel contributes: red favours the first digit, blue the second.

    Args:
        x: ``(28, 28)``, 0 to 1; dark is 1.
        parts: ``(28, 28)``, each pixel's part of the sum that decides.
        title: Text above both.
        digits: The two digits.
        b: What the network adds to that sum, if it has one layer.
        picture: The original picture, ``(H, W, 3)`` uint8 or a Pillow image, to draw on the left.
        box: Left, top, right and bottom of the digit in it, in pixels.
    """
    first, second = digits
    limit = parts.abs().max().item() or 1.0
    count = 2 + (picture is not None)
    figure = Figure(figsize=(3.2 * count, 3.6), facecolor="white")
    panels = [figure.add_axes(((k + 0.04) / count, 0.17, 0.92 / count, 0.7)) for k in range(count)]
    if picture is not None:
        panels[0].imshow(picture)
        panels[0].set_anchor("S")
        if box is not None:
            left, top, right, bottom = box
            outline = [left, right, right, left, left], [top, top, bottom, bottom, top]
            panels[0].plot(*outline, color="white", linewidth=3.5)
            panels[0].plot(*outline, color=LINE, linewidth=1.5)
    panels[-2].imshow(x.numpy(), cmap="gray_r", vmin=0, vmax=1)
    panels[-1].imshow(parts.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    sums = parts.clamp(min=0).sum(), -parts.clamp(max=0).sum()
    said = f"for {first}: {sums[0]:.2f} (red), for {second}: {sums[1]:.2f} (blue)"
    if b is not None:
        said += f"\nb adds {b:+.2f}: {parts.sum() + b:+.2f} in all, above 0 for {first}"
    texts = ["the picture, and the digit found in it"] * (count - 2) + ["the image as the network sees it", said]
    for axes, text in zip(panels, texts, strict=True):
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(text, fontsize=9)
    figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    return figure


def quality(kind: Kind, probability: Tensor, y: Tensor, digits: tuple[int, int] = (3, 7)) -> Figure:
    """Draw how well the digits are told apart.

    Args:
        kind: "confusion_matrix" shows how many images of each digit get which answer: the second digit below a
            probability of 0.5, otherwise the first. "roc", the receiver operating characteristic, and
            "precision_recall" show what is gained and lost as that threshold goes down.
        probability: Probability of the first digit, ``(N, 1)``, 0 to 1.
        y: Labels, ``(N, 1)``: 1 for the first digit, 0 for the second.
        digits: The two digits.
    """
    first, second = digits
    probability, y = probability.detach().flatten().float().cpu(), y.flatten().int().cpu()
    if kind == "confusion_matrix":
        counts = binary_confusion_matrix((probability >= THRESHOLD).int(), y).flip(0, 1)
        figure, axes = _panel(3.9, f"{counts[0, 1] + counts[1, 0]:,} of {len(y):,} are wrong", "answer", "digit")
        axes.imshow(counts.numpy(), cmap="Blues", vmin=0)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            color = "white" if counts[row, column] > counts.max() / 2 else INK
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=16, color=color)
        axes.set(xticks=[0, 1], yticks=[0, 1], xticklabels=digits, yticklabels=digits)
        return figure
    found = f"fraction of the {first}s found"
    if kind == "roc":
        across, up, _ = binary_roc(probability, y)
        title = f"ROC: area under the curve {torch.trapezoid(up, across).item():.4f}"
        figure, axes = _panel(3.9, title, f"fraction of the {second}s taken for a {first}", found)
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    else:
        up, across, _ = binary_precision_recall_curve(probability, y)
        figure, axes = _panel(3.9, f"Precision and recall of the {first}s", f"recall: {found}", "precision")
    axes.plot(across.numpy(), up.numpy(), color=LINE)
    # the corner with the point of the curve that is nearest to the ideal, just large enough to show it
    ideal = 0.0 if kind == "roc" else 1.0
    nearest = torch.maximum((across - ideal).abs(), 1 - up).min().item()
    side = next(side for side in (0.05, 0.1, 0.2, 0.5, 1.0) if nearest < side / 2 or side == 1)
    room = 0.02 * side
    left, right = (-room, side + room) if kind == "roc" else (1 - side - room, 1 + room)
    axes.set(xlim=(left, right), ylim=(1 - side - room, 1 + room))
    axes.yaxis.labelpad = -16  # between the ticks
    axes.set(xticks=[0, side] if kind == "roc" else [1 - side, 1], yticks=[1 - side, 1])
    axes.grid(color="#dddddd")
    return figure


def learning_curves(steps: Sequence[int], losses: Tensor, table: Sequence[dict[str, Any]]) -> Figure:
    """Draw loss over steps for each learning rate: the median over seeds, and a band from the lowest to the highest.

    Args:
        steps: T numbers of steps, from 1.
        losses: ``(T, K)``, of K networks.
        table: K rows with "lr", "init_std" and "diverged"; each init_std gets a panel.
    """
    spreads, rates = ([*dict.fromkeys(row[name] for row in table)] for name in ("init_std", "lr"))
    figure = Figure(figsize=(5.6 * len(spreads) + 0.6, 5), facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(spreads), squeeze=False, sharey=True)[0]
    lowest = losses[losses > 0].min().item() if (losses > 0).any() else 0.1
    for axes, spread in zip(panels, spreads, strict=True):
        axes.set(xscale="log", yscale="log", ylim=(0.8 * lowest, 1), xlabel="step", title=f"start N(0, {spread:g}²)")
        for i, lr in enumerate(sorted(rates)):
            columns = [k for k, row in enumerate(table) if (row["lr"], row["init_std"]) == (lr, spread)]
            here = losses[:, columns].double()
            lost = sum(table[k]["diverged"] for k in columns)
            label = f"{lr:g}" + f", {lost} of {len(columns)} diverged" * bool(lost)
            color = colormaps["viridis"](0.95 * i / max(1, len(rates) - 1))
            median = here.nanquantile(0.5, 1)
            axes.plot(steps, median.numpy(), color=color, label=label, linestyle="--" if lost else "-")
            low, high = (here.nanquantile(q, 1).numpy() for q in (0.0, 1.0))
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.grid(color="#dddddd")
        axes.legend(title="learning rate", fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4)
    panels[0].set_ylabel("mean squared error of the training images")
    return figure


def losses(ends: Tensor, mark: float) -> Figure:
    """Draw the distribution of the final losses of N runs, ``(N,)``, and one more loss to compare them with."""
    figure, axes = _panel(5.2, f"Where {len(ends)} random starts end (red: {mark})", "mean squared error", "starts")
    axes.hist(ends.numpy(), bins=[i / 20 for i in range(17)], color="#92c5de", edgecolor="white")
    axes.axvline(mark, color=LINE)
    return figure


def _panel(width: float, title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure with axes in a fixed place, which takes half the time of automatic layout."""
    figure = Figure(figsize=(width, 3.6), facecolor="white")
    axes = figure.add_axes((0.15, 0.13, 0.79, 0.76), xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=11)
    return figure, axes
