import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from lit_threeseven import LitThreeSeven, dataset
from lit_threeseven.networks import LitThreeSevenMLP
from lit_threeseven.use import NoInkError, normalize

SCALING = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def test_set():
    images, y = dataset.load(dataset.BUNDLED_ROOT, (3, 7), train=False)
    return images, y.flatten() == 1


def redraw(image, random: np.random.Generator) -> Image.Image:
    """An MNIST image at another size, on paper of another shape, somewhere, dark on light or light on dark."""
    side = int(math.exp(random.uniform(math.log(40), math.log(800))))
    width, height = (int(side * random.uniform(1, 2)) for _ in range(2))
    page = Image.new("L", (width, height), 0)
    digit = Image.fromarray(image.numpy()).resize((side, side), SCALING[random.integers(4)])
    page.paste(digit, (int(random.integers(width - side + 1)), int(random.integers(height - side + 1))))
    return page.point(lambda value: 255 - value) if random.integers(2) else page


def page(mode: str = "RGB", paper="white", ink="black", size=(300, 400), digit: int = 7) -> Image.Image:
    """A seven or a three in the upper left."""
    picture = Image.new(mode, size, paper)
    pen = ImageDraw.Draw(picture)
    if digit == 7:
        pen.line([(30, 40), (150, 40), (80, 210)], fill=ink, width=18, joint="curve")
    else:
        pen.arc((40, 30, 140, 125), 190, 90, fill=ink, width=18)
        pen.arc((35, 108, 150, 220), 270, 170, fill=ink, width=18)
    return picture


def similar(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max().item() < 0.06


@pytest.mark.slow
def test_redrawn_test_images_cost_less_than_half_a_point_of_accuracy(test_set):
    images, is_three = (values[::2] for values in test_set)
    random = np.random.default_rng(0)
    redrawn = torch.stack([normalize(redraw(image, random)) for image in images])
    assert len(redrawn) == 1019
    for model in (LitThreeSeven.from_pretrained(), LitThreeSevenMLP.from_pretrained()):
        with torch.no_grad():
            before, after = (((model(x) >= 0.5).flatten() == is_three).double().mean() for x in (images / 255, redrawn))
        assert after > before - 0.005


def test_an_mnist_image_is_hardly_changed(test_set):
    images, _ = test_set
    random = np.random.default_rng(1)
    differences = [(normalize(redraw(image, random)) - image / 255).abs().mean().item() for image in images[:50]]
    assert np.mean(differences) < 0.04  # the images themselves have a mean of 0.13


@pytest.mark.parametrize("size", [(21, 21), (300, 400), (1000, 230), (4100, 2900)])
def test_the_longer_side_has_20_pixels_and_the_centre_of_mass_is_in_the_middle(size):
    picture = Image.new("L", size, 255)
    ImageDraw.Draw(picture).ellipse((1, 3, 10, 18), fill=0)
    if max(size) > 500:  # somewhere else, and larger
        picture = Image.new("L", size, 255)
        ImageDraw.Draw(picture).ellipse((size[0] - 160, 20, size[0] - 70, 180), fill=0)
    image = normalize(picture)
    assert image.shape == (28, 28)
    assert image.dtype == torch.float32
    assert image.min() == 0
    assert image.max() == 1
    places = torch.arange(28) + 0.5
    for profile in (image.sum(0), image.sum(1)):
        assert ((profile * places).sum() / profile.sum()).item() == pytest.approx(14.5, abs=0.02)
    inked = (image > 0.5).nonzero()
    height, width = (inked.amax(0) - inked.amin(0) + 1).tolist()
    assert height == pytest.approx(20, abs=1)
    assert width == pytest.approx(20 * 10 / 16 if max(size) < 500 else 20 * 91 / 161, abs=1)


@pytest.mark.parametrize(
    ("mode", "paper", "ink"),
    [
        ("1", 1, 0),
        ("1", 0, 1),
        ("L", 250, 20),
        ("L", 5, 180),
        ("RGB", "white", "navy"),
        ("RGB", "darkgreen", "white"),
        ("CMYK", (0, 0, 0, 0), (255, 255, 0, 50)),
        ("YCbCr", (240, 128, 128), (30, 120, 140)),
        ("HSV", (0, 0, 255), (100, 255, 60)),
        ("RGBA", (255, 255, 255, 255), (0, 0, 0, 255)),
        ("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)),  # only the ink is there
        ("RGBA", (0, 0, 0, 0), (255, 255, 255, 255)),
        ("LA", (0, 0), (0, 255)),
        ("I;16", 60000, 100),
        ("I", -5, 100000),
        ("F", 0.0, 1.0),
    ],
)
def test_every_mode_and_polarity_of_a_picture_gives_the_same_image(mode, paper, ink):
    assert similar(normalize(page(mode, paper, ink)), normalize(page()))


def test_a_picture_with_a_palette_and_a_transparent_colour_is_read_as_it_looks():
    picture = page("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)).quantize(2)
    assert picture.mode == "P"
    assert picture.has_transparency_data
    assert similar(normalize(picture), normalize(page()))


def test_transparent_corners_are_not_ink():
    picture = page().convert("RGBA")
    for corner in ((0, 0), (280, 0), (0, 380), (280, 380)):
        picture.paste((0, 0, 0, 0), (*corner, corner[0] + 20, corner[1] + 20))
    assert similar(normalize(picture), normalize(page()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_says(orientation):
    turns = dict(zip(range(2, 9), (0, 3, 1, 5, 2, 6, 4), strict=True))  # the way back, as Pillow numbers it
    stored = page() if orientation == 1 else page().transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    assert similar(normalize(Image.open(file)), normalize(page()))


def test_noise_shadow_specks_and_compression_hardly_matter():
    random = np.random.default_rng(0)
    clean = page("L", 255, 0, size=(600, 800))
    ink = 1 - np.asarray(clean) / 255
    light = np.linspace(150, 220, 600)[None] * np.linspace(1, 0.9, 800)[:, None]  # a shadow from the left
    grey = light * (1 - 0.8 * ink) + random.normal(0, 6, ink.shape)
    for row, column in random.integers(0, 590, (4, 2)):
        grey[row, column : column + 2] = 30  # dust
    file = io.BytesIO()
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=40)
    assert (normalize(Image.open(file)) - normalize(clean)).abs().mean() < 0.02


@pytest.mark.parametrize("width", [1, 4, 25])
@pytest.mark.parametrize("color", ["black", "gray"])
def test_a_border_around_the_paper_is_no_ink(width, color):
    bordered = ImageOps.expand(page(), width, color)
    assert similar(normalize(bordered), normalize(page()))
    assert similar(normalize(ImageOps.invert(bordered)), normalize(page()))


def test_ink_at_the_edges_is_no_border():
    seven = Image.new("L", (100, 160), 255)
    pen = ImageDraw.Draw(seven)
    pen.rectangle((0, 0, 99, 14), fill=0)
    pen.line([(92, 0), (40, 160)], fill=0, width=15)
    assert (normalize(seven) - normalize(ImageOps.expand(seven, 30, 255))).abs().mean() < 0.05  # of another pen


@pytest.mark.parametrize("squares", [False, True])
def test_lines_of_the_paper_are_no_ink(squares):
    picture, clean = (page(size=(600, 700), digit=3) for _ in range(2))
    paper = Image.new("RGB", picture.size, (248, 248, 244))
    pen = ImageDraw.Draw(paper)
    for place in range(15, 700, 45):
        pen.line([(0, place), (600, place)], fill=(170, 200, 235), width=2)
        if squares:
            pen.line([(place, 0), (place, 700)], fill=(170, 200, 235), width=2)
    file = io.BytesIO()
    Image.composite(paper, picture, picture.convert("L")).save(file, "JPEG", quality=60)
    assert (normalize(Image.open(file)) - normalize(clean)).abs().mean() < 0.01


@pytest.mark.parametrize("width", [2, 5, 15, 50])
@pytest.mark.parametrize("digit", [3, 7])
def test_thin_and_thick_pens_are_recognised(digit, width):
    picture = Image.new("L", (480, 640), 255)
    pen = ImageDraw.Draw(picture)
    if digit == 7:
        pen.line([(120, 100), (350, 100), (210, 540)], fill=0, width=width, joint="curve")
    else:
        pen.arc((120, 90, 330, 310), 190, 90, fill=0, width=width)
        pen.arc((110, 310 - width, 350, 560), 270, 170, fill=0, width=width)
    probability = LitThreeSeven.from_pretrained()(normalize(picture).unsqueeze(0)).item()
    assert (probability > 0.5) == (digit == 3)


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "F"])
def test_a_picture_without_ink_is_refused(mode):
    for size in ((1, 1), (1, 7), (200, 100)):
        with pytest.raises(NoInkError, match="no ink"):
            normalize(Image.new(mode, size))


def test_noise_alone_is_no_ink():
    noise = np.random.default_rng(0).normal(200, 5, (300, 300)).clip(0, 255)
    for values in (noise.astype(np.uint8), (noise * 200).astype(np.uint16), (noise / 255).astype(np.float32)):
        with pytest.raises(NoInkError):
            normalize(Image.fromarray(values))


def test_numbers_that_are_not_finite_are_no_ink():
    values = np.ones((20, 20), np.float32)
    values[5:9, 5] = 100
    plain = normalize(Image.fromarray(values))
    values[0, 0] = np.nan
    assert torch.equal(normalize(Image.fromarray(values)), plain)
