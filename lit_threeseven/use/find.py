"""Find the digit in a picture: what differs from the paper near it, and of that the group most like a training image.

A clear picture, with one group of ink on plain paper, needs no search: that is the digit. `page.html` reads these
alone, by the same steps in JavaScript; change both together.

In others, geometry only proposes: at a few levels of contrast and with a few gaps between strokes, each group of ink
becomes an image in MNIST's form. A table, a shadow's edge, a box or a stain may be among them. The image nearest to a
training image is the digit. `scipy.ndimage` does the local filters, distances and connected components: it has all of
them, and starts in a sixth of the time that torch takes.
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

WORK = 640  # pixels of the longer side in which the digit is looked for
COARSE = 64  # pixels of the longer side in which the paper is estimated
CORNER = 5  # of these: how much of a corner of the paper a median may round off
LEVELS = (0.5, 0.25, 0.12)  # of the strongest contrast: what is above one of them may be ink
GAP = 0.012  # of the longer side: strokes of a digit that are nearer than this are one group
LEAST = 32  # of 255: a picture of which no pixel differs more from the paper has no ink
FAINT = 18  # of 255: less is never ink
GROUPS = 5  # with the most ink are tried, at each level and gap
LINE = 0.6  # of the picture's width or height: straight ink that is longer and thin is a line of the paper
STEEP = 0.2  # slope of the most askew line
PEN = 2.0  # pixels of the image: thinner pens are made as thick, as most of MNIST's are
FINE = 160  # pixels of the longer side of a group when it is made into an image
THIN = 0.25  # of the digit's area: a mark that covers less is no digit, but what is left of a line
CLEAR = 50  # of 255: the ink of a clear picture differs more from its paper
SHORT = 15  # pixels: a clear digit is longer
TRACE = 0.2  # of the strongest contrast: less is paper
UNEVEN = 0.002  # share of a clear picture's paper that may differ more than that
MARK = 0.32  # cosine distance from the training images, and doubt, below which another group counts as a digit

# What speaks against a group, as if it were so much farther from the training images: that the picture's edge cuts it
# off, that it is small, that it is a blot, that it is a line.
CUT, SMALL, BLOT, LINED = 0.1, 0.1, 0.1, 0.2
NARROW = 0.15  # of its length: what is narrower is a line
INK = 11  # length of an image as a vector, from which it is a blot; one training image in ten is longer
BLOTTED = 13.5  # length that one training image in four hundred exceeds
ROUGH = 0.25  # of the strongest contrast: where half of the picture differs more from the paper, there is no paper
UNLIKE = 0.2  # cosine distance that one test image in twenty exceeds, and four in five of other digits


Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass
class Found:
    """A digit in a picture.

    Attributes:
        image: ``(28, 28)`` float32, 0 (paper) to 1 (ink), as MNIST's images.
        box: Left, top, right and bottom of the ink, in pixels of the picture as it is seen, turned by its EXIF data.
        distance: One minus the cosine between the image and the nearest training image, 0 to 1.
        certain: Whether it is like training images, as 19 of 20 test images are.
    """

    image: Tensor
    box: Box
    distance: float
    certain: bool


def find(picture: Image.Image) -> list[Found]:
    """Find the digits in a picture, the likeliest first; several if there are several marks as large and as alike.

    Args:
        picture: Of any size and any mode of Pillow's.

    Raises:
        NoInkError: If nothing in it differs enough from the paper.
        OSError: If the picture's file is damaged.
    """
    colours, scale = pictures.colours(picture)
    found, rough = [*_clear(colours)], False
    if not found:
        contrast = differences(colours)
        small = max(contrast.shape) <= 2 * pictures.SIDE  # a digit may fill it, and there is no light to speak of
        faint = contrast.max() < LEAST or ndimage.uniform_filter(contrast, 3, mode="nearest").max() < LEAST / 2
        if faint and not small:
            raise NoInkError("there is no ink")
        found = [*_whole(colours), *(() if faint else _groups(contrast))]
        rough = not small and bool(np.median(contrast) > ROUGH * contrast.max())
    if not found:
        raise NoInkError("there is no ink")
    images = torch.from_numpy(np.stack([one.image for one in found])).float()
    distances = nearest(images)
    blots = (images.flatten(1).norm(dim=1) - INK).clamp(min=0)
    scores = distances + torch.tensor([one.doubt for one in found]) + BLOT * blots
    marks: list[Found] = []
    best = 0
    boxes: list[Box] = []
    for k in scores.argsort().tolist():
        box = found[k].box
        if marks and not (
            scores[k] < MARK
            and found[k].area > THIN * found[best].area
            and 0.5 < _length(box) / _length(boxes[0]) < 2
            and all(_apart(box, other) for other in boxes)
        ):
            continue
        best = best if marks else k
        boxes.append(box)
        inside = tuple(round(side * scale) for side in box)
        certain = bool(distances[k] <= UNLIKE and images[k].norm() <= BLOTTED and not rough)
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
    """What may be the digit.

    Attributes:
        image: ``(28, 28)``, 0 to 1.
        box: Of the ink.
        area: Pixels of ink.
        doubt: What speaks against it, in units of the distance from the training images.
    """

    image: Array
    box: Box
    area: int
    doubt: float


def _whole(colours: Array) -> Iterator[Candidate]:
    """All ink of the picture at once, on paper of which the edges tell colour and light; right for pictures cut close.

    It is the one way for digits that fill the picture, where there is more ink than paper around many a pixel.
    """
    try:
        (top, left), cut = pictures.without_border(colours @ pictures.GREY)
        ink = pictures.ink(cut)
    except NoInkError:
        return
    rows, columns = (np.flatnonzero((ink > 0.55).any(axis)) for axis in (1, 0))
    box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    yield Candidate(pictures.place(ink), box, int((ink > 0.55).sum()), 0)


def _clear(colours: Array) -> Iterator[Candidate]:
    """The digit of a clear picture: its only group of ink, away from its edges, dark enough, on even paper.

    Strokes that nearly touch are one group. Just beside them the paper may be darker, as it is in blurred pictures.
    """
    (top, left), cut = pictures.without_border(colours @ pictures.GREY)
    try:
        ink = pictures.ink(cut)
    except NoInkError:
        return
    drawn = ink > pictures.INK[0]
    joined, near = (
        ndimage.maximum_filter(drawn, 2 * max(1, max(ink.shape) // share) + 1, mode="constant") for share in (100, 25)
    )
    paper = np.abs(ink[~near])
    rows, columns = (np.flatnonzero(drawn.any(axis)) for axis in (1, 0))
    if (
        np.ptp(cut) < CLEAR
        or max(np.ptp(rows), np.ptp(columns)) < SHORT
        or rows[0] == 0
        or columns[0] == 0
        or rows[-1] == len(ink) - 1
        or columns[-1] == len(ink[0]) - 1
        or paper.max(initial=0) > pictures.INK[0]
        or (paper > TRACE).sum() > UNEVEN * paper.size
        or ndimage.label(joined, np.ones((3, 3)))[1] > 1
        or framed(drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    ):
        return
    box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    inside = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    yield Candidate(pictures.place(thicken(inside.clip(0, 1))), box, int(drawn.sum()), 0)


def framed(drawn: NDArray[np.bool_]) -> bool:
    """Whether ink that touches the edges of its box goes along all four of them, as a printed box does."""
    down, across = (max(1, int(0.1 * side + 0.5)) for side in drawn.shape)  # a half goes up, as in the page
    sides = drawn[:down].any(0), drawn[-down:].any(0), drawn[:, :across].any(1), drawn[:, -across:].any(1)
    return bool(min(side.mean() for side in sides) > 0.9)


def _groups(contrast: Array) -> Iterator[Candidate]:
    """Groups of ink that lie near one another, each as an image."""
    height, width = contrast.shape
    peak = ndimage.uniform_filter(contrast, 3).max()
    noise = 1.5 * np.median(contrast)
    reach = round(GAP * max(height, width))
    for level in LEVELS:
        mask = without_lines(contrast > max(level * peak, FAINT, 4 * noise))
        labels, _ = ndimage.label(ndimage.maximum_filter(mask, 2 * reach + 1), np.ones((3, 3)))
        labels[~mask] = 0
        sizes = np.bincount(labels.flat)
        sizes[0] = 0
        places = ndimage.find_objects(labels)
        for k in sizes.argsort()[::-1][:GROUPS]:
            if sizes[k] < 12:
                break
            rows, columns = places[k - 1]
            box = (columns.start, rows.start, columns.stop, rows.stop)
            sides = rows.stop - rows.start, columns.stop - columns.start
            if max(sides) < max(8, 0.03 * max(height, width)):
                continue
            doubt = LINED * (min(sides) < NARROW * max(sides)) + SMALL * (1 - max(sides) / max(height, width))
            doubt += CUT * (rows.start == 0 or columns.start == 0 or rows.stop == height or columns.stop == width)
            yield Candidate(_image(contrast, labels == k, box), box, int(sizes[k]), doubt)


def differences(colours: Array) -> Array:
    """How much each pixel differs from every colour of the paper near it, ``(H, W)``, 0 to 255.

    The paper is the median of a wide neighbourhood. Where two kinds of paper meet, as at a table's or a shadow's edge,
    all colours between the two are paper too.
    """
    height, width, _ = colours.shape
    step = max(1, -(-max(height, width) // COARSE))
    coarse = np.asarray(Image.fromarray(colours.astype(np.uint8)).reduce(step), np.float32)
    wide = 0.45 if step > 1 else 0.9  # of a small picture the digit may be nearly all
    window = max(3, round(wide * min(coarse.shape[:2])) | 1)
    paper = ndimage.median_filter(coarse, (window, window, 1), mode="nearest")
    # a median rounds corners: where another paper is near, and fits better, it is that one
    wider = np.pad(paper, ((CORNER, CORNER), (CORNER, CORNER), (0, 0)), "edge")
    rows, columns, _ = paper.shape
    corners = [(i, j) for i in (CORNER, 0, 2 * CORNER) for j in (CORNER, 0, 2 * CORNER)]
    moved = np.stack([wider[i : i + rows, j : j + columns] for i, j in corners])
    misfit = ((moved - coarse) ** 2).sum(-1)
    misfit[1:] += FAINT**2
    paper = np.take_along_axis(moved, misfit.argmin(0)[None, ..., None], 0)[0]
    total = np.zeros((height, width), np.float32)
    for channel in range(3):
        low, high = (
            np.asarray(
                Image.fromarray(extreme(paper[..., channel], 3)).resize((width, height), Image.Resampling.BILINEAR)
            )
            for extreme in (ndimage.minimum_filter, ndimage.maximum_filter)
        )
        values = colours[..., channel]
        total += np.maximum(np.maximum(low - values, values - high), 0) ** 2
    return np.sqrt(total / 3)


def without_lines(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Ink without straight thin lines through most of the picture, such as ruled paper's, found as Hough did."""
    mask = mask.copy()
    for side in (mask, mask.T):  # lines across, then lines down
        height, width = side.shape
        rows, columns = np.nonzero(side)
        if not len(rows):
            break
        thick = max(3, round(0.012 * max(mask.shape)))
        tall = ndimage.minimum_filter(side, (thick + 1, 1))  # strokes across a line go on above and below it
        tall = ndimage.maximum_filter(tall, (thick + 1, 1), origin=(-(1 - (thick + 1) % 2), 0))
        loose = ~tall[rows, columns]
        rows, columns = rows[loose], columns[loose]
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


def _image(contrast: Array, group: NDArray[np.bool_], box: Box) -> Array:
    """The image of one group of ink."""
    left, top, right, bottom = box
    edge = 3
    window = slice(max(0, top - edge), bottom + edge), slice(max(0, left - edge), right + edge)
    own = group[window]
    near = ndimage.maximum_filter(own, 2 * edge - 1)
    strength = contrast[window] * near
    wide = 0.1 * _length(box)
    level = ndimage.gaussian_filter(strength * own, wide) / np.maximum(ndimage.gaussian_filter(own * 1.0, wide), 1e-6)
    ink = np.where(near, strength / np.maximum(level, 1e-6), 0)
    longest = max(ink.shape)
    zoom = min(1.0, FINE / longest)
    if zoom < 1:
        shape = (max(1, round(ink.shape[1] * zoom)), max(1, round(ink.shape[0] * zoom)))
        ink = np.asarray(Image.fromarray(ink.astype(np.float32)).resize(shape, Image.Resampling.BOX), np.float64)
    return pictures.place(thicken(ink / max(ink.max(), 1e-6) if ink.max() < 0.7 else ink.clip(0, 1)))


def thicken(ink: Array) -> Array:
    """Ink of a pen at least as thick as `PEN` of the 20 pixels of an image."""
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


def _length(box: Box) -> int:
    return max(box[2] - box[0], box[3] - box[1])


def _apart(a: Box, b: Box) -> bool:
    """Whether marks are beside one another, or far enough above one another not to be parts of one digit."""
    far = 0.2 * max(_length(a), _length(b))
    return a[2] <= b[0] or b[2] <= a[0] or a[3] + far <= b[1] or b[3] + far <= a[1]
