"""Pictures as people take them: test images and strokes, drawn on paper, photographed, scanned or shot off a screen.

`KINDS` has a function for each kind of picture. `pictures` draws some of a kind; the same seed gives the same pictures.
"""

import io
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from lit_threeseven import dataset
from lit_threeseven.commands.recognize import doubt, usual
from lit_threeseven.use import NoInkError
from lit_threeseven.use.find import find

Random = np.random.Generator

# Strokes, as points from the left and from the top, 0 to 1; long ones are smooth curves.
CURVED = {
    3: [
        [
            (0.12, 0.16),
            (0.45, 0.0),
            (0.85, 0.13),
            (0.8, 0.36),
            (0.42, 0.47),
            (0.85, 0.58),
            (0.92, 0.83),
            (0.5, 1),
            (0.05, 0.87),
        ]
    ],
}
FLAT_THREE = [
    [(0.1, 0.0), (0.9, 0.0), (0.45, 0.42)],
    [(0.45, 0.42), (0.85, 0.55), (0.9, 0.83), (0.5, 1.0), (0.05, 0.9)],
]
SEVEN = [[(0.05, 0.03), (0.95, 0.0), (0.35, 1.0)]]
CROSSED = [*SEVEN, [(0.3, 0.52), (0.88, 0.47)]]
SERIF = [[(0.05, 0.18), (0.07, 0.01), (0.95, 0.0), (0.4, 1.0)]]


def smooth(points: np.ndarray, n: int = 14) -> np.ndarray:
    """A Catmull-Rom curve through points, ``(P, 2)``."""
    p = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, n)[:, None]
    parts = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return np.concatenate(parts)


class Hand:
    """Where digits come from, each ``(height, width)``, 0 to 1, of the ink alone."""

    def __init__(self, random: Random) -> None:
        self.random = random
        images, y = dataset.load(dataset.BUNDLED_ROOT, (3, 7), train=False)
        self.images, self.labels = images.numpy(), y.flatten().numpy()

    def image(self, digit: int, size: int) -> np.ndarray:
        """A test image, enlarged so that its ink is `size` pixels long, with edges like those of a pen."""
        pixels = self.images[self.random.choice(np.flatnonzero(self.labels == (digit == 3)))]
        rows, columns = (np.flatnonzero(pixels.max(axis) > 60) for axis in (1, 0))
        cut = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        scale = size / max(cut.shape)
        shape = tuple(max(1, round(scale * n)) for n in (cut.shape[1] + 2, cut.shape[0] + 2))
        large = Image.fromarray(np.pad(cut, 1)).resize(shape, Image.Resampling.BICUBIC)
        return np.clip((np.asarray(large, float) / 255 - 0.35) / max(0.04, min(0.3, 3 / scale)), 0, 1)

    def strokes(self, digit: int, size: int, pen: float = 0.1, forms: list | None = None) -> np.ndarray:
        """A digit of strokes with a pen of a width of `pen` sizes."""
        r = self.random
        if forms is None:
            forms = CURVED[3] if digit == 3 else [SEVEN, SEVEN, CROSSED, SERIF][r.integers(4)]
        turn, slant, narrow = r.normal(0, 0.06), r.normal(0.08, 0.12), r.uniform(0.5, 0.8)
        matrix = np.array([[narrow, -slant - turn], [turn, 1.0]])
        drawn = []
        for form in forms:
            points = np.array(form) + r.normal(0, 0.018, (len(form), 2))
            if len(form) > 4:
                points = smooth(points)
            elif len(form) == 2:
                points = smooth(points, 8)
            drawn.append(points @ matrix.T)
        low = np.min([p.min(0) for p in drawn], axis=0)
        high = np.max([p.max(0) for p in drawn], axis=0)
        over, width = 3, max(pen * size, 1)
        scale = (size - width) / (high - low).max()
        shape = np.ceil(((high - low) * scale + width + 2) * over).astype(int)
        sheet = Image.new("L", tuple(shape.tolist()))
        draw = ImageDraw.Draw(sheet)
        for points in drawn:
            line = [tuple(xy) for xy in ((points - low) * scale + width / 2 + 1) * over]
            draw.line(line, fill=255, width=round(width * over), joint="curve")
            for x, y in (line[0], line[-1]):
                radius = width * over / 2
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return np.asarray(sheet.reduce(over), float) / 255

    def any(self, digit: int, size: int) -> np.ndarray:
        """One or the other."""
        return (
            self.image(digit, size)
            if self.random.random() < 0.6
            else self.strokes(digit, size, self.random.uniform(0.05, 0.13))
        )


class Page:
    """A sheet of paper to draw on and to photograph.

    Args:
        random: Where chance comes from.
        size: Width and height in pixels; by default some of 300 to 1200.
        paper: Colour; by default some white.
    """

    def __init__(self, random: Random, size: tuple[int, int] | None = None, paper: tuple | None = None) -> None:
        self.random, self.hand = random, Hand(random)
        if size is None:
            long = math.exp(random.uniform(math.log(400), math.log(1100)))
            size = (round(long), round(0.75 * long))[:: random.choice([1, -1])]
        self.width, self.height = size
        self.unit = max(size) / 800
        if paper is None:
            paper = np.array([238, 236, 230]) + random.uniform(-22, 14)
        self.pixels = np.ones((self.height, self.width, 3)) * np.array(paper, float)
        self.box: tuple[int, int, int, int] | None = None  # left, top, right, bottom of the digit

    def blend(self, cover: np.ndarray, colour: tuple) -> "Page":
        """Cover each pixel by a share of a colour, ``(H, W)``."""
        self.pixels += cover[..., None] * (np.array(colour, float) - self.pixels)
        return self

    def draw(self, what: Callable[[ImageDraw.ImageDraw], None], colour: tuple, strength: float = 1.0) -> "Page":
        """Draw something with Pillow, smoothly."""
        sheet = Image.new("L", (self.width, self.height))
        what(ImageDraw.Draw(sheet))
        return self.blend(strength * np.asarray(sheet.filter(ImageFilter.GaussianBlur(0.6)), float) / 255, colour)

    def line(self, ends: tuple, width: float, colour: tuple) -> "Page":
        """A straight line."""
        return self.draw(lambda d: d.line(ends, fill=255, width=max(1, round(width))), colour)

    def write(
        self,
        digit: int,
        ink: tuple | None = None,
        share: float | None = None,
        mask: np.ndarray | None = None,
        at: tuple[float, float] | None = None,
        strength: float = 1.0,
    ) -> "Page":
        """Write the digit somewhere, its length a share of the page's shorter side."""
        r = self.random
        size = round((share or r.uniform(0.25, 0.6)) * min(self.width, self.height))
        mask = self.hand.any(digit, size) if mask is None else mask
        height, width = mask.shape
        x, y = at or (r.uniform(0.12, 0.88), r.uniform(0.12, 0.88))
        left = round(np.clip(x * self.width - width / 2, 0.04 * self.width, max(0.96 * self.width - width, 0)))
        top = round(np.clip(y * self.height - height / 2, 0.04 * self.height, max(0.96 * self.height - height, 0)))
        cover = np.zeros((self.height, self.width))
        mask = mask[: self.height - top, : self.width - left]
        cover[top : top + mask.shape[0], left : left + mask.shape[1]] = strength * mask
        self.box = (left, top, left + width, top + height)
        return self.blend(cover, ink or INKS[r.integers(len(INKS))])

    def light(self, least: float) -> "Page":
        """Light falls off towards some side, to a share of at least `least`."""
        angle, y, x = (
            self.random.uniform(0, 2 * math.pi),
            *np.mgrid[-1 : 1 : self.height * 1j, -1 : 1 : self.width * 1j],
        )
        across = (x * math.cos(angle) + y * math.sin(angle)) / 1.5
        self.pixels *= (1 - (1 - least) * (0.5 + 0.5 * across).clip(0, 1))[..., None]
        return self

    def camera(self, noise: float = 4, blur: float = 0.7, light: float = 0.85, quality: int = 80) -> Image.Image:
        """The picture of the page."""
        self.light(light)
        soft = ndimage.gaussian_filter(self.pixels, (blur * self.unit, blur * self.unit, 0))
        return self.file(soft + self.random.normal(0, noise, soft.shape), quality)

    def file(self, pixels: np.ndarray | None = None, quality: int | None = None) -> Image.Image:
        """The page itself, as PNG, or as JPEG of a quality."""
        picture = Image.fromarray((self.pixels if pixels is None else pixels).clip(0, 255).astype(np.uint8))
        if quality is None:
            return picture
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    def on_table(self, shift: Callable[[int, int], list], quality: int = 80) -> Image.Image:
        """Photograph the page, its corners at the four places that `shift` gives of its size, on a table."""
        r = self.random
        table = np.array([(92, 62, 40), (60, 60, 66), (140, 104, 70), (30, 34, 40)][r.integers(4)], float)
        corners = np.array(shift(self.width, self.height), float)
        source = [(0, 0), (self.width, 0), (self.width, self.height), (0, self.height)]
        rows, values = [], []
        for (u, v), (x, y) in zip(source, corners, strict=True):
            rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
            values += [u, v]
        data = tuple(np.linalg.solve(np.array(rows), np.array(values)))
        size = (self.width, self.height)
        sheet = Image.fromarray(self.pixels.clip(0, 255).astype(np.uint8))
        page = np.asarray(sheet.transform(size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR), float)
        shape = np.asarray(Image.new("L", size, 255).transform(size, Image.Transform.PERSPECTIVE, data), float) / 255
        grain = ndimage.gaussian_filter(r.normal(0, 1, (self.height, self.width)), (1, 25))
        wood = table * (1 + 0.6 * grain[..., None])
        self.pixels = page * shape[..., None] + wood * (1 - shape[..., None])
        return self.camera(quality=quality)


INKS = [(28, 30, 36), (24, 38, 110), (20, 60, 150), (52, 48, 50), (150, 26, 36)]
KINDS: dict[str, Callable[[Random, int], Image.Image]] = {}


def kind(draw: Callable[[Random, int], Image.Image]) -> Callable[[Random, int], Image.Image]:
    """Add a function to `KINDS`, under its name in words."""
    KINDS[draw.__name__.replace("_", " ").strip()] = draw
    return draw


def pictures(name: str, count: int, seed: int = 0) -> Iterator[tuple[Image.Image, int]]:
    """Pictures of a kind, threes and sevens in turn, with the digit."""
    for i in range(count):
        digit = 3 if i % 2 else 7
        yield KINDS[name](np.random.default_rng([seed, i, *name.encode()]), digit), digit


def pen(random: Random, width: tuple[float, float]) -> Callable[[Page, int], np.ndarray]:
    """Strokes of a pen of some width."""
    return lambda page, digit: page.hand.strokes(
        digit, round(random.uniform(0.3, 0.6) * min(page.width, page.height)), random.uniform(*width)
    )


@kind
def plain(r, d):
    return Page(r).write(d).file()


@kind
def photo(r, d):
    return Page(r).write(d).camera()


@kind
def ballpoint(r, d):
    return (p := Page(r)).write(d, (30, 44, 130), mask=pen(r, (0.016, 0.03))(p, d)).camera()


@kind
def pencil(r, d):
    return (p := Page(r)).write(d, (105, 105, 110), mask=pen(r, (0.018, 0.035))(p, d), strength=0.85).camera()


@kind
def felt_pen(r, d):
    return (p := Page(r)).write(d, mask=pen(r, (0.12, 0.2))(p, d)).camera()


@kind
def crossed_seven_and_curved_three(r, d):
    p = Page(r)
    return p.write(d, mask=p.hand.strokes(d, 220, 0.08, CROSSED if d == 7 else None)).camera()


@kind
def seven_with_a_serif_and_flat_three(r, d):
    p = Page(r)
    return p.write(d, mask=p.hand.strokes(d, 220, 0.08, SERIF if d == 7 else FLAT_THREE)).camera()


@kind
def chalk(r, d):
    p = Page(r, paper=(38, 62, 52))
    p.write(d, (225, 225, 215))
    smear = ndimage.gaussian_filter(r.normal(0, 1, (p.height, p.width)), 30)
    p.pixels += 150 * smear[..., None] + r.normal(0, 5, (p.height, p.width, 1))
    return p.camera()


def lined(r, d, colour, ink=None, squares=False, width=1.5, step=None, mask=None):
    p, step, tilt = Page(r), step or r.uniform(28, 60), r.normal(0, 0.012)
    gap = step * p.unit
    for k in range(int(max(p.height, p.width) / gap) + 2):
        at, rise = (k + 0.3) * gap, tilt * p.width
        if at < p.height + 40:
            p.line((0, at, p.width, at + rise), width * p.unit, colour)
        if squares:
            p.line((at, 0, at - tilt * p.height, p.height), width * p.unit, colour)
    return p.write(d, ink, mask=mask and mask(p, d)).camera()


@kind
def ruled_light(r, d):
    return lined(r, d, (170, 195, 225))


@kind
def ruled_dark(r, d):
    return lined(r, d, (95, 95, 110), width=2)


@kind
def squared_light(r, d):
    return lined(r, d, (175, 195, 215), squares=True, step=r.uniform(18, 35))


@kind
def squared_dark(r, d):
    return lined(r, d, (110, 115, 130), squares=True, step=r.uniform(24, 40))


@kind
def blue_lines_blue_pen(r, d):
    return lined(r, d, (110, 140, 205), (30, 50, 150))


@kind
def margin_line(r, d):
    p = Page(r)
    x = r.uniform(0.1, 0.2) * p.width
    return (
        p.line((x, 0, x + r.normal(0, 8), p.height), 3 * p.unit, (215, 60, 70))
        .write(d, at=(0.62, r.uniform(0.2, 0.8)))
        .camera()
    )


@kind
def punch_holes(r, d):
    p = Page(r)
    for y in (0.35, 0.65):
        x, y, e = 0.05 * p.width, y * p.height, 14 * p.unit
        p.draw(lambda q, x=x, y=y, e=e: q.ellipse((x - e, y - e, x + e, y + e), fill=255), (40, 36, 34))
    return p.write(d, at=(0.6, r.uniform(0.2, 0.8))).camera()


@kind
def table_along_one_side(r, d):
    c = r.uniform(0.08, 0.22)
    return (
        Page(r)
        .write(d, at=(0.6, 0.5), share=0.4)
        .on_table(lambda w, h: [(c * w, -9), (w + 9, -9), (w + 9, h + 9), (c * w + r.normal(0, 12), h + 9)])
    )


@kind
def sheet_askew(r, d):
    s = r.uniform(-0.12, 0.12)
    return (
        Page(r)
        .write(d, at=(0.5, 0.5), share=0.4)
        .on_table(
            lambda w, h: [
                (0.12 * w + s * h, 0.1 * h - s * w),
                (0.9 * w + s * h, 0.1 * h + s * w),
                (0.9 * w - s * h, 0.9 * h + s * w),
                (0.12 * w - s * h, 0.9 * h - s * w),
            ]
        )
    )


@kind
def perspective(r, d):
    a = r.uniform(0.08, 0.2)
    return (
        Page(r)
        .write(d, at=(0.5, 0.5))
        .on_table(
            lambda w, h: [(a * w, 0.08 * h), ((1 - a) * w, 0.08 * h), (1.02 * w, 1.02 * h), (-0.02 * w, 1.02 * h)]
        )
    )


@kind
def scanner_corners(r, d):
    p, e = Page(r), r.uniform(0.03, 0.1)
    w, h = p.width, p.height
    p.write(d, at=(0.5, 0.5)).draw(
        lambda q: [
            q.polygon(c, fill=255) for c in ([(0, 0), (e * w, 0), (0, 0.9 * h)], [(w, h), (w, 0.2 * h), (w - e * w, h)])
        ],
        (8, 8, 8),
    )
    return p.camera(noise=2, light=1)


@kind
def printed_box(r, d):
    p = Page(r).write(d, at=(0.5, 0.5), share=0.35)
    x0, y0, x1, y1 = p.box
    e = r.uniform(14, 40) * p.unit
    return p.draw(
        lambda q: q.rectangle((x0 - e, y0 - e, x1 + e, y1 + e), outline=255, width=max(1, round(2.5 * p.unit))),
        (40, 40, 40),
    ).camera()


@kind
def check_boxes(r, d):
    p = Page(r).write(d, at=(0.6, 0.5), share=0.35)
    for k in range(4):
        x, y, s = 0.08 * p.width, (0.15 + 0.2 * k) * p.height, 22 * p.unit
        p.draw(
            lambda q, x=x, y=y, s=s: q.rectangle((x, y, x + s, y + s), outline=255, width=max(1, round(2 * p.unit))),
            (50, 50, 50),
        )
    return p.camera()


@kind
def specks(r, d):
    p = Page(r).write(d)
    for x, y in r.uniform(0.03, 0.97, (3, 2)):
        x, y, e = x * p.width, y * p.height, r.uniform(3, 7) * p.unit
        p.draw(lambda q, x=x, y=y, e=e: q.ellipse((x - e, y - e, x + e, y + e), fill=255), (50, 45, 40))
    return p.camera()


@kind
def stain(r, d):
    p = Page(r).write(d, at=(0.3, 0.5), share=0.4)
    x, y, e = 0.78 * p.width, r.uniform(0.2, 0.8) * p.height, r.uniform(40, 80) * p.unit
    return p.draw(lambda q: q.ellipse((x - e, y - e, x + e, y + 0.8 * e), fill=255), (160, 120, 70), 0.7).camera()


@kind
def stamp(r, d):
    p = Page(r).write(d, at=(0.32, 0.45), share=0.4)
    x, y, e = 0.8 * p.width, 0.75 * p.height, 75 * p.unit
    return p.draw(
        lambda q: [
            q.ellipse((x - f, y - f, x + f, y + f), outline=255, width=max(1, round(4 * p.unit))) for f in (e, 0.7 * e)
        ],
        (190, 50, 60),
        0.8,
    ).camera()


@kind
def screenshot_with_toolbar(r, d):
    p = Page(r, paper=(255, 255, 255))
    h = round(r.uniform(0.07, 0.13) * p.height)
    p.pixels[:h] = [(60, 64, 72), (222, 225, 230), (43, 87, 154)][r.integers(3)]
    for k in range(5):
        p.pixels[h // 4 : 3 * h // 4, (k + 1) * h : (k + 1) * h + h // 2] = r.uniform(0, 255, 3)
    return p.write(d, (0, 0, 0), at=(0.5, 0.62), share=0.5).file()


@kind
def light_falls_off(r, d):
    return Page(r).write(d).camera(light=r.uniform(0.45, 0.7))


@kind
def hard_shadow(r, d):
    p = Page(r).write(d)
    a, b = r.uniform(0.1, 0.9, 2)
    w, h = p.width, p.height
    mask = Image.new("L", (w, h))
    ImageDraw.Draw(mask).polygon([(0, 0), (a * w, 0), (b * w, h), (0, h)], fill=255)
    p.pixels *= (
        1
        - r.uniform(0.25, 0.45)
        * np.asarray(mask.filter(ImageFilter.GaussianBlur(r.uniform(1, 6) * p.unit)), float)[..., None]
        / 255
    )
    return p.camera()


@kind
def crumpled(r, d):
    p = Page(r).write(d)
    waves = ndimage.gaussian_filter(r.normal(0, 1, (p.height // 8 + 1, p.width // 8 + 1)), 5)
    waves = ndimage.zoom(waves / np.abs(waves).max(), 8, order=1)[: p.height, : p.width]
    p.pixels *= 1 - 0.22 * np.abs(waves)[..., None]
    return p.camera()


@kind
def flash(r, d):
    p = Page(r, paper=(190, 188, 180)).write(d, at=(0.35, 0.6))
    y, x = np.mgrid[: p.height, : p.width]
    glare = np.exp(-((x - 0.7 * p.width) ** 2 + (y - 0.3 * p.height) ** 2) / (0.2 * p.width) ** 2)
    return p.blend(0.9 * glare, (255, 255, 255)).camera()


@kind
def finger(r, d):
    p = Page(r).write(d, at=(0.35, 0.4), share=0.4)
    x, y, e = r.uniform(0.75, 0.95) * p.width, p.height, 70 * p.unit
    return p.draw(lambda q: q.ellipse((x - e, y - 1.6 * e, x + e, y + 2 * e), fill=255), (205, 150, 125)).camera()


@kind
def fold(r, d):
    p, y = Page(r).write(d), r.uniform(0.3, 0.7)
    p.pixels[round(y * p.height) :] *= 0.9
    return p.line((0, y * p.height, p.width, y * p.height), 2 * p.unit, (180, 178, 172)).camera()


@kind
def sticky_note(r, d):
    return (
        Page(r, paper=(246, 226, 92))
        .write(d, at=(0.5, 0.5), share=0.4)
        .on_table(lambda w, h: [(0.1 * w, 0.12 * h), (0.88 * w, 0.08 * h), (0.92 * w, 0.9 * h), (0.12 * w, 0.92 * h)])
    )


@kind
def cut_close(r, d):
    p = Page(r).write(d, share=0.55)
    x0, y0, x1, y1 = p.box
    return p.file(quality=90).crop((max(0, x0 - 2), max(0, y0 - 2), min(p.width, x1 + 2), min(p.height, y1 + 2)))


@kind
def touching_an_edge(r, d):
    p = Page(r).write(d)
    x0, y0, _, _ = p.box
    return p.camera(light=1).crop((x0 if r.random() < 0.5 else 0, y0 + 1, p.width, p.height))


@kind
def with_a_gap(r, d):
    p = Page(r)
    mask = p.hand.any(d, round(0.45 * min(p.width, p.height)))
    y, h = r.uniform(0.3, 0.7) * len(mask), 0.025 * len(mask)
    mask = mask * (np.abs(np.arange(len(mask)) - y) > h)[:, None]
    return p.write(d, mask=mask).camera()


@kind
def jpeg_10(r, d):
    return Page(r).write(d).camera(quality=10)


@kind
def of_100_pixels(r, d):
    return Page(r, (100, 130)).write(d, share=0.5).camera(noise=3)


@kind
def of_4000_pixels(r, d):
    return Page(r, (2700, 2000)).write(d, share=0.3).file(quality=80).resize((4000, 3000))


@kind
def yellow_marker(r, d):
    return Page(r, paper=(250, 250, 250)).write(d, (250, 225, 40), share=0.5).camera(light=0.95)


@kind
def red_on_green(r, d):
    return Page(r, paper=(70, 150, 80)).write(d, (205, 60, 55)).camera()


@kind
def orange_on_blue(r, d):
    return Page(r, paper=(75, 120, 205)).write(d, (235, 130, 40)).camera()


@kind
def white_on_yellow(r, d):
    return Page(r, paper=(244, 214, 66)).write(d, (255, 255, 255)).camera()


@kind
def green_on_pink(r, d):
    return Page(r, paper=(240, 160, 185)).write(d, (90, 175, 100)).camera()


@kind
def whiteboard(r, d):
    return Page(r, paper=(235, 238, 240)).write(d, (20, 120, 60)).camera(light=0.6, noise=6)


@kind
def slide_dark(r, d):
    return Page(r, paper=(18, 22, 40)).write(d, (120, 200, 255)).file()


@kind
def graph_paper_green(r, d):
    return lined(r, d, (160, 210, 170), squares=True, step=r.uniform(14, 22), width=1)


@kind
def noisy_and_blurred(r, d):
    return Page(r).write(d).camera(noise=14, blur=2.2)


@kind
def transparent(r, d):
    p = Page(r)
    mask = p.hand.any(d, 240)
    alpha = Image.fromarray((255 * np.pad(mask, 40)).astype(np.uint8))
    picture = Image.new("RGBA", alpha.size, [(0, 0, 0, 0), (255, 255, 255, 0)][r.integers(2)])
    picture.putalpha(alpha)
    return picture


@kind
def dotted_paper(r, d):
    p, step = Page(r), r.uniform(22, 40)
    places = [(x, y) for x in np.arange(9, p.width, step * p.unit) for y in np.arange(9, p.height, step * p.unit)]
    e = 1.3 * p.unit
    p.draw(lambda q: [q.ellipse((x - e, y - e, x + e, y + e), fill=255) for x, y in places], (120, 120, 130))
    return p.write(d).camera()


@kind
def coffee_ring(r, d):
    p = Page(r).write(d, at=(0.35, 0.4), share=0.45)
    x, y, e = 0.75 * p.width, 0.7 * p.height, r.uniform(70, 130) * p.unit
    width = max(1, round(9 * p.unit))
    p.draw(lambda q: q.ellipse((x - e, y - e, x + e, y + e), outline=255, width=width), (140, 95, 50), 0.6)
    return p.camera()


@kind
def another_sheet_at_a_corner(r, d):
    p = Page(r).write(d, at=(0.35, 0.4), share=0.4)
    x, y = r.uniform(0.6, 0.8, 2) * (p.width, p.height)
    corner = [(x, p.height), (p.width, y), (p.width, p.height)]
    return p.draw(lambda q: q.polygon(corner, fill=255), (205, 190, 150)).camera()


@kind
def name_in_print_above(r, d):
    p = Page(r).write(d, at=(0.5, 0.6), share=0.45)
    words = "".join(r.choice(list("ABCDEFGHKLMNOPRSTU"), 14))
    p.draw(lambda q: q.text((0.1 * p.width, 0.04 * p.height), words, fill=255, font_size=20 * p.unit), (40, 40, 40))
    return p.camera()


def blank(random: Random) -> Image.Image:
    """A page without ink, in uneven light."""
    return Page(random).camera(light=random.uniform(0.4, 0.95), noise=random.uniform(1, 6))


def two_digits(random: Random) -> Image.Image:
    """Two digits beside one another."""
    p = Page(random)
    for x in (0.3, 0.7):
        p.write(int(random.choice([3, 7])), (30, 30, 40), share=0.35, at=(x, 0.5))
    return p.camera()


def measure(name: str, count: int, seed: int, models: list) -> dict[str, list[float]]:
    """How networks answer pictures of a kind.

    Returns:
        For each network the share, 0 to 1, that is right ("right"), of these with a remark ("remarked"), and how many
        are wrong without one ("silent"). A picture without a digit, or with several, is wrong and remarked.
    """
    right, remarked, silent = ([0.0] * len(models) for _ in range(3))
    limits = [usual(model) for model in models]
    for picture, digit in pictures(name, count, seed):
        try:
            found = find(picture)
        except NoInkError:
            continue
        for k, model in enumerate(models):
            with torch.no_grad():
                p = model(found[0].image.unsqueeze(0)).item()
            says = model.digits[p < 0.5]
            said = len(found) > 1 or bool(doubt(found[0], p, limits[k]))
            if len(found) == 1 and says == digit:
                right[k] += 1
                remarked[k] += said
            else:
                silent[k] += not said
    return {"right": [n / count for n in right], "remarked": [n / count for n in remarked], "silent": silent}
