"""Find the digit in a picture: of all marks that differ from the paper, the one most like a training image.

In a clear picture, with one group of ink on plain paper, that group is the digit. `page.html` reads only such pictures,
by the same steps in JavaScript; change both together.

In other pictures, all ink at once, and each group of it at a few levels of contrast, become images like MNIST's. A
table, a shadow's edge, a box or a stain may be among them. The nearest to a training image is the digit; what is small,
faint, a blot, or cut off by an edge must be nearer. `scipy.ndimage` does the local filters, distances and connected
components: it has all of them, and starts in a sixth of the time that torch takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from lit_threeseven.use import pictures
from lit_threeseven.use.pictures import Array, NoInkError

COARSE = 64  # pixels of the longer side in which the paper is estimated
CORNER = 5  # of these: how much of a corner of the paper a median may round off
LEVELS = (0.5, 0.25, 0.12)  # of the strongest contrast: what is above one of them may be ink
GAP = 0.012  # of the longer side: strokes of a digit that are nearer than this are one group
LEAST = 32  # of 255: if no pixel differs more from the paper, there is no ink
FAINT = 18  # of 255: what differs less is never ink
GROUPS = 5  # with the most ink are tried, at each level
LINE = 0.6  # of the picture's width or height: straight ink that is longer and thin is a line of the paper
STEEP = 0.2  # slope of the most tilted line
PEN = 2.0  # pixels of the image: thinner pens are made as thick, as most of MNIST's are
THIN = 0.25  # of the digit's area: a mark that covers less is no digit, but what is left of a line
CLEAR = 50  # of 255: the ink of a clear picture differs more from its paper
SHORT = 15  # pixels: a clear digit is longer
TRACE = 0.2  # of the strongest contrast: less is paper
UNEVEN = 0.002  # fraction of a clear picture's paper that may differ more than that
MARK = 0.36  # cosine distance from the training images, and doubt, below which another group counts as a digit

# What counts against ink, as extra distance from the training images: that there is more ink, that the picture's edge
# cuts it off, that it is small, that it is fainter than other ink, that it is a blot.
PART, CUT, SMALL, FAINTER, BLOT = 0.02, 0.1, 0.05, 0.2, 0.1
INK = 11.5  # an image whose length as a vector is above this may be a blot; one training image in sixteen is
BLOTTED = 13.5  # length that one training image in four hundred exceeds
UNLIKE = 0.2  # cosine distance that one test image in twenty exceeds, and four in five of other digits


Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass
class Found:
    """A digit in a picture.

    Attributes:
        image: ``(28, 28)`` float32, 0 (paper) to 1 (ink), as MNIST's images.
        box: Left, top, right and bottom of the ink, in pixels of the picture after rotation by its EXIF data.
        distance: One minus the cosine between the image and the nearest training image, 0 to 1.
        certain: Whether it is like training images, as 19 of 20 test images are.
    """

    image: Tensor
    box: Box
    distance: float
    certain: bool


def find(picture: Image.Image) -> list[Found]:
    """Find the digits in a picture, the likeliest first; several if other marks are about as large and alike.

    Args:
        picture: Of any size and any mode of Pillow's.

    Raises:
        NoInkError: If nothing in it differs enough from the paper.
        OSError: If the picture's file is damaged.
    """
    colours, scale = pictures.colours(picture)
    size = max(colours.shape)
    found, clear = _whole(colours)
    filled = bool(found) and size <= 2 * pictures.SIDE  # the digit may leave no paper to compare with
    if not clear and not filled:
        contrast = differences(colours)
        inked = contrast.max() >= LEAST and ndimage.uniform_filter(contrast, 3).max() >= LEAST / 2
        found = [*found, *_groups(contrast)] if inked else []
    if not found:
        raise NoInkError("there is no ink")
    images = torch.from_numpy(np.stack([one.image for one in found])).float()
    distances = nearest(images)
    lengths = images.flatten(1).norm(dim=1)
    strongest = max(one.contrast for one in found)
    doubts = torch.tensor(
        [one.doubt + SMALL * (1 - _length(one.box) / size) + FAINTER * (1 - one.contrast / strongest) for one in found]
    )
    scores = distances + doubts + BLOT * (lengths - INK).clamp(min=0)
    marks: list[Found] = []
    chosen: list[Candidate] = []
    for k in scores.argsort().tolist():
        one = found[k]
        if chosen and not (
            scores[k] < MARK
            and one.area > THIN * chosen[0].area
            and 0.5 < _length(one.box) / _length(chosen[0].box) < 2
            and all(_apart(one.box, other.box) for other in chosen)
        ):
            continue
        chosen.append(one)
        inside = tuple(round(side * scale) for side in one.box)
        certain = bool(distances[k] <= UNLIKE and lengths[k] <= BLOTTED)
        marks.append(Found(images[k], inside, distances[k].item(), certain))
    return marks


def every(picture: Image.Image) -> list[Found]:
    """As `find`, but from left to right, as people read."""
    return sorted(find(picture), key=lambda one: one.box)


def nearest(x: Tensor) -> Tensor:
    """How far images, ``(N, 28, 28)``, are from the nearest training image: one minus the cosine, ``(N,)``, 0 to 1."""
    return 1 - (torch.nn.functional.normalize(x.flatten(1)) @ _training_images().t()).amax(1)


@cache
def _training_images() -> Tensor:
    return torch.nn.functional.normalize(bundled_images("train").flatten(1))


def bundled_images(part: Literal["train", "t10k"]) -> Tensor:
    """The training images or the test images that come with the package, ``(N, 28, 28)`` float32, 0 to 1."""
    file = pictures.BUNDLED / "MNIST" / "raw" / f"{part}-images-idx3-ubyte"
    pixels = np.frombuffer(file.read_bytes(), np.uint8, offset=16)
    return torch.from_numpy(pixels.reshape(-1, pictures.SIDE, pictures.SIDE) / np.float32(255))


@dataclass
class Candidate:
    """A group of ink that may be the digit.

    Attributes:
        image: ``(28, 28)``, 0 to 1.
        box: Of the ink.
        area: Pixels of ink.
        contrast: How much this ink differs from the paper, 0 to 255.
        doubt: What counts against it by itself, as extra distance from the training images.
    """

    image: Array
    box: Box
    area: int
    contrast: float
    doubt: float


def _whole(colours: Array) -> tuple[list[Candidate], bool]:
    """All ink of a picture at once, and whether the picture is clear.

    The edges of the picture tell the colour of its paper and the light on it. A picture is clear if its ink is dark
    enough and makes one group away from the edges, on even paper. Strokes that nearly touch are one group. Just beside
    them the paper may be darker, as it is in blurred pictures.
    """
    (top, left), cut = pictures.without_border(colours @ pictures.GREY)
    try:
        ink = pictures.ink(cut)
    except NoInkError:
        return [], False
    drawn = ink > pictures.INK[0]
    joined, near = (
        ndimage.maximum_filter(drawn, 2 * max(1, max(ink.shape) // share) + 1, mode="constant") for share in (100, 25)
    )
    paper = np.abs(ink[~near])
    rows, columns = (np.flatnonzero(drawn.any(axis)) for axis in (1, 0))
    inside = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    clear = bool(
        np.ptp(cut) >= CLEAR
        and max(np.ptp(rows), np.ptp(columns)) >= SHORT
        and rows[0] > 0
        and columns[0] > 0
        and rows[-1] < len(ink) - 1
        and columns[-1] < len(ink[0]) - 1
        and paper.max(initial=0) <= pictures.INK[0]
        and (paper > TRACE).sum() <= UNEVEN * paper.size
        and ndimage.label(joined, np.ones((3, 3)))[1] == 1
        and not framed(drawn[inside])
    )
    box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    image = pictures.place(thicken(ink[inside].clip(0, 1)))
    contrast = float(np.median(ink[drawn])) * float(np.ptp(cut))
    return [Candidate(image, box, int(drawn.sum()), contrast, _cut(box, colours))], clear


def framed(drawn: NDArray[np.bool_]) -> bool:
    """Whether ink that touches the edges of its box goes along all four of them, as a printed box does."""
    down, across = (max(1, int(0.1 * side + 0.5)) for side in drawn.shape)  # round half up, as the page does
    sides = drawn[:down].any(0), drawn[-down:].any(0), drawn[:, :across].any(1), drawn[:, -across:].any(1)
    return bool(min(side.mean() for side in sides) > 0.9)


def _groups(contrast: Array) -> Iterator[Candidate]:
    """Groups of ink that lie near one another, each as an image."""
    size = max(contrast.shape)
    peak = ndimage.uniform_filter(contrast, 3).max()
    for level in LEVELS:
        mask = without_lines(contrast > max(level * peak, FAINT))
        labels, _ = ndimage.label(ndimage.maximum_filter(mask, 2 * round(GAP * size) + 1), np.ones((3, 3)))
        labels[~mask] = 0
        places = ndimage.find_objects(labels)
        areas = np.bincount(labels.flat)[1:]
        for k in areas.argsort()[::-1][:GROUPS]:
            rows, columns = place = places[k]
            box = (columns.start, rows.start, columns.stop, rows.stop)
            length = _length(box)
            if length < max(8, 0.03 * size):
                continue
            ink = contrast[place] * (labels[place] == k + 1)
            strong = float(np.median(ink[ink > 0]))
            ink = (ink / strong).clip(0, 1)
            yield Candidate(pictures.place(thicken(ink)), box, int(areas[k]), strong, PART + _cut(box, contrast))


def differences(colours: Array) -> Array:
    """How much each pixel differs from every colour of the paper near it, ``(H, W)``, 0 to 255.

    The paper is the median of a wide neighbourhood. Where two kinds of paper meet, as at a table's or a shadow's edge,
    all colours between the two are paper too.
    """
    height, width, _ = colours.shape
    step = max(1, -(-max(height, width) // COARSE))
    coarse = np.asarray(Image.fromarray(colours.astype(np.uint8)).reduce(step), np.float32)
    wide = 0.45 if step > 1 else 0.9  # in a small picture the digit may fill nearly everything
    window = max(3, round(wide * min(coarse.shape[:2])) | 1)
    paper = ndimage.median_filter(coarse, (window, window, 1), mode="nearest")
    # a median rounds corners: use the paper of a nearby place if it fits better
    wider = np.pad(paper, ((CORNER, CORNER), (CORNER, CORNER), (0, 0)), "edge")
    rows, columns, _ = paper.shape
    corners = [(i, j) for i in (CORNER, 0, 2 * CORNER) for j in (CORNER, 0, 2 * CORNER)]
    moved = np.stack([wider[i : i + rows, j : j + columns] for i, j in corners])
    misfit = ((moved - coarse) ** 2).sum(-1)
    misfit[1:] += FAINT**2
    paper = np.take_along_axis(moved, misfit.argmin(0)[None, ..., None], 0)[0]
    low, high = (
        np.asarray(Image.fromarray(part.astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR), float)
        for part in (ndimage.minimum_filter(paper, (3, 3, 1)), ndimage.maximum_filter(paper, (3, 3, 1)))
    )
    outside = np.maximum(low - colours, colours - high).clip(0)
    contrast: Array = np.sqrt((outside**2).mean(-1))
    return contrast


def without_lines(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Ink without straight thin lines across most of the picture, such as ruled paper's, found by Hough's method."""
    mask = mask.copy()
    for side in (mask, mask.T):  # lines across, then lines down
        height, width = side.shape
        rows, columns = np.nonzero(side)
        if not len(rows):
            break
        gone = np.zeros(len(rows), bool)
        shift = int(STEEP * width) + 1
        for slope in np.linspace(-STEEP, STEEP, 81):
            place = (rows - slope * columns + shift).astype(np.intp)
            counts = np.bincount(place, minlength=height + 2 * shift + 2)
            if counts.max() >= LINE * width:
                lines = ndimage.maximum_filter(counts >= LINE * width, 5)
                gone |= lines[place]
        side[rows[gone], columns[gone]] = False
    return mask


def thicken(ink: Array) -> Array:
    """Make ink at least as thick as a pen of `PEN` pixels, of the 20 that a digit is long."""
    drawn = ink > 0.5
    inside = ndimage.distance_transform_edt(np.pad(drawn, 1))[1:-1, 1:-1]
    if not drawn.any():
        return ink
    pen = 4 * inside[drawn].mean() - 1  # the mean distance from the edge is a quarter of the width
    extent = max(np.ptp(np.flatnonzero(drawn.any(axis))) + 1 for axis in (0, 1))
    more = (PEN / pictures.BOX * extent - pen) / 2
    if more <= 0.3:
        return ink
    room = int(more) + 2
    outside = ndimage.distance_transform_edt(~np.pad(drawn, room))
    thicker: Array = np.maximum(np.pad(ink, room), (more + 0.5 - (outside - 0.5)).clip(0, 1))
    return thicker


def _cut(box: Box, picture: Array) -> float:
    """The doubt about ink that touches an edge of the picture."""
    return CUT * (0 in box[:2] or box[2] == picture.shape[1] or box[3] == picture.shape[0])


def _length(box: Box) -> int:
    return max(box[2] - box[0], box[3] - box[1])


def _apart(a: Box, b: Box) -> bool:
    """Whether marks are beside one another, or far enough above one another not to be parts of one digit."""
    far = 0.2 * max(_length(a), _length(b))
    return a[2] <= b[0] or b[2] <= a[0] or a[3] + far <= b[1] or b[3] + far <= a[1]
