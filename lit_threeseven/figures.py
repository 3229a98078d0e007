"""Pictures of the network, as matplotlib figures that need no display."""

from matplotlib.figure import Figure
from torch import Tensor


def weights(W: Tensor, digits: tuple[int, int] = (3, 7)) -> Figure:
    """Draw `W` as an image: where ink speaks for the first digit, and where for the second.

    Args:
        W: ``(784, 1)``.
        digits: The two digits that `W` tells apart.

    Returns:
        A figure with one 28×28 picture in a diverging palette that is centred on zero.
    """
    first, second = digits
    picture = W.detach().cpu().reshape(28, 28)
    limit = picture.abs().max().item() or 1.0
    figure = Figure(figsize=(4.6, 3.8), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    image = axes.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set(title=f"W: what makes a {first}, and what a {second}", xlabel="column", ylabel="row")
    axes.set_xticks(range(0, 28, 9))
    axes.set_yticks(range(0, 28, 9))
    figure.colorbar(image, label=f"weight of the pixel  ({second} ← 0 → {first})")
    return figure
