"""Turn pictures into images like MNIST's: light ink on black, 20 pixels long, its centre of mass in the middle.

`place` is also written in JavaScript, in `page.html`; change both together.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

Array = NDArray[np.float64]

SIDE = 28
BOX = 20  # pixels of the longer side of the ink
CENTRE = 14.5  # where MNIST's images have their centre of mass, on average, from the left and from the top
LARGE = 640  # pixels; a picture with a longer side is made smaller first
LEAST_CONTRAST = 32  # of 255: what differs less from the paper is not ink
INK = (0.4, 0.7)  # of the contrast: no ink below, full ink above; this leaves out lines and shadows
OUTSIDE = 0.002  # share of the ink that may stick out of the box on each side, as specks do
GREY = np.array([0.299, 0.587, 0.114])  # how bright red, green and blue are, as Pillow has it
BUNDLED = Path(__file__).parents[1] / "bundled"


# Files that aren't opened: what they begin with, after at most 300 bytes, what they are, and what to do.
FOREIGN = {
    rb"....ftyp(heic|heix|hevc|mif1|msf1|heim|heis)": ("a HEIC photo", "save or export it as JPEG"),
    rb"%PDF-": ("a PDF", "save the page as PNG, or take a screenshot"),
    rb"%!PS|\xc5\xd0\xd3\xc6": ("PostScript", "save it as PNG"),
    rb"[^\0]{0,300}<svg\b": ("an SVG drawing", "export it as PNG"),
}
FOREIGN_ENDINGS = {".heic", ".heif", ".svg", ".pdf", ".eps"}


def foreign(file: str) -> str:
    """The format of a file that Pillow can't open, and what to do about it; empty if it is unknown."""
    with Path(file).open("rb") as content:
        start = content.read(1000)
    for begin, (what, remedy) in FOREIGN.items():
        if re.match(begin, start, re.DOTALL):
            return f"it is {what}; {remedy}"
    return ""


def formats() -> list[str]:
    """Pillow's formats that are opened: all but EPS, which would start Ghostscript."""
    Image.init()
    return [kind for kind in Image.ID if kind != "EPS"]


class NoInkError(ValueError):
    """A picture shows nothing: it has hardly any contrast."""


def normalize(picture: Image.Image) -> Tensor:
    """Bring a picture of a digit into the form of MNIST's images.

    This is how LeCun, Cortes and Burges made MNIST (http://yann.lecun.com/exdb/mnist): the ink's bounding box is scaled
    to 20×20 pixels, keeping its aspect ratio, and moved until its centre of mass is in the middle of 28×28. Before
    that, the picture is turned as its EXIF data says, put on paper where it is transparent, made grey, and inverted
    if it is dark on light: what most of its edge shows is taken for the paper.

    Args:
        picture: Of any size and any mode of Pillow's, with one digit on plain paper. A border around the paper is cut
            off.

    Returns:
        ``(28, 28)`` float32, 0 (paper) to 1 (ink); a batch of them is what `LitThreeSeven` takes.

    Raises:
        NoInkError: If its contrast is below 32 of 255.
        OSError: If the picture's file is damaged.

    Example:
        >>> from lit_threeseven import LitThreeSeven
        >>> page = Image.new("L", (90, 120), "white")
        >>> page.paste("black", (20, 20, 60, 30))  # left, top, right, bottom: the bar of a seven
        >>> page.paste("black", (50, 20, 60, 100))
        >>> probability = LitThreeSeven.from_pretrained()(normalize(page).unsqueeze(0))
        >>> bool(probability < 0.5)
        True
    """
    from lit_threeseven.use.find import find

    return find(picture)[0].image


def colours(picture: Image.Image) -> tuple[Array, float]:
    """Red, green and blue of a picture, ``(H, W, 3)``, 0 to 255, as it is seen, with at most `LARGE` pixels a side.

    Returns:
        And how many pixels of the picture one of these pixels is long.
    """
    full = max(picture.size)
    if picture.format == "JPEG":
        picture.draft("RGB", (2 * LARGE, 2 * LARGE))  # read at a fraction of the size, in a fraction of the time
    shown = _opaque(ImageOps.exif_transpose(picture))
    shown = shown.reduce(-(-max(shown.size) // LARGE))
    values = np.nan_to_num(np.asarray(shown, np.float64))
    if shown.mode == "F":  # more than 8 bits, in a range that the file doesn't tell
        values = values - min(values.min(), 0)
        values *= 255 / max(values.max(), 1e-300)
        values = np.repeat(values[..., None], 3, axis=2)
    return values, full / max(shown.size)


def ink(grey: Array) -> Array:
    """How much ink there is in each pixel, up to 1, from grey values, ``(H, W)``, 0 to 255; raises `NoInkError`.

    What most of the edge shows is the paper. If one side is darker than another, as in a photo, so is the paper between
    them, evenly.
    """
    sides = grey[0], grey[-1], grey[:, 0], grey[:, -1]
    contrast = grey - np.median(np.concatenate(sides))
    top, bottom, left, right = (np.median(side) for side in sides)
    if np.ptp([top, bottom, left, right]) < np.abs(contrast).max() / 2:  # otherwise a side is full of ink
        height, width = grey.shape
        contrast -= np.linspace(top - bottom, bottom - top, height)[:, None] / 2
        contrast -= np.linspace(left - right, right - left, width) / 2
    if -contrast.min() > contrast.max():
        contrast = -contrast
    if contrast.max() < LEAST_CONTRAST:
        raise NoInkError("there is no ink")
    strength: Array = contrast / contrast.max()
    return strength


def place(ink: Array) -> Array:
    """Scale and move the ink in a picture as `normalize` says.

    Args:
        ink: ``(H, W)``, up to 1, which it must reach; what is below 0.4 doesn't count.

    Returns:
        ``(28, 28)``, 0 to 1. Each pixel is the mean of the area that it covers.
    """
    low, high = INK
    ink = np.clip((ink - low) / (high - low), 0, 1)
    down, across = ink.sum(1), ink.sum(0)
    scale = max(_extent(down), _extent(across)) / BOX  # pixels of the picture for one of the image
    rows, columns = _areas(down, scale), _areas(across, scale)
    image: Array = rows @ ink @ columns.T
    image /= image.max()
    return image


def without_border(grey: Array) -> tuple[tuple[int, int], Array]:
    """The picture inside a border, such as a screenshot's: all four sides differ from most of it; and its corner."""
    other = np.abs(grey - np.median(grey)) > 0.3 * np.ptp(grey)
    inside = [np.flatnonzero(other.mean(axis) < 0.9) for axis in (1, 0)]
    (top, bottom), (left, right) = ((lines[0], lines[-1] + 1) if len(lines) else (0, 0) for lines in inside)
    bordered = 0 < top < bottom < len(grey) and 0 < left < right < len(grey[0])
    return ((top, left), grey[top:bottom, left:right]) if bordered else ((0, 0), grey)


def _extent(profile: Array) -> float:
    """Length in which all but `OUTSIDE` of a profile's ink lies on each side, by linear interpolation."""
    total = np.concatenate([[0.0], np.cumsum(profile)]) / profile.sum()
    # of several places with the same total, the inner ones count
    first = np.searchsorted(total, OUTSIDE, "right") - 1
    last = np.searchsorted(total, 1 - OUTSIDE, "left")
    start = first + (OUTSIDE - total[first]) / (total[first + 1] - total[first])
    end = last - (total[last] - (1 - OUTSIDE)) / (total[last] - total[last - 1])
    return float(end - start)


def _areas(profile: Array, scale: float) -> Array:
    """Share of each picture row in each image row, ``(28, H)``, with the centre of mass at `CENTRE`."""
    places = np.arange(len(profile))
    centre = profile @ (places + 0.5) / profile.sum()
    edges = centre + scale * (np.arange(SIDE + 1) - CENTRE)
    overlap = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
    shares: Array = overlap.clip(min=0) / scale
    return shares


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture in mode RGB, or in F if it has more than 8 bits; on paper where it is transparent."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        return Image.fromarray(np.asarray(picture).astype(np.float32))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    colour, opaque = picture.convert("RGB"), np.asarray(picture.getchannel("A")) >= 128
    shown = np.asarray(colour)[opaque]
    # mostly opaque, it has paper of its own, perhaps with round corners; otherwise what shows is the ink
    if opaque.mean() > 0.5:
        paper = tuple(int(value) for value in np.median(shown, axis=0))
    else:
        paper = (0, 0, 0) if shown.size and (shown @ GREY).mean() >= 128 else (255, 255, 255)
    return Image.composite(colour, Image.new("RGB", picture.size, paper), picture.getchannel("A"))
