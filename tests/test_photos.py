"""Pictures as people take them: how many are right, remarked, or refused; and pictures that hold no digit."""

import time
from contextlib import suppress

import drawn
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lit_threeseven import LitThreeSeven, dataset
from lit_threeseven.networks import LitThreeSevenMLP
from lit_threeseven.use import NoInkError
from lit_threeseven.use.find import every, find
from lit_threeseven.use.pictures import foreign


@pytest.fixture(scope="module")
def models():
    return [LitThreeSeven.from_pretrained(), LitThreeSevenMLP.from_pretrained()]


def check(table: dict, count: int, least: float) -> None:
    """Hold what was measured against what is promised."""
    right, remarked, silent = (
        np.array([row[name] for row in table.values()]) for name in ("right", "remarked", "silent")
    )
    assert (right.mean(0) >= (0.97, 0.98)).all(), right.mean(0)
    assert not (bad := {name: row["right"] for name, row in table.items() if min(row["right"]) < least}), bad
    assert (remarked.sum(0) <= 0.1 * right.sum(0)).all()  # 0.083 of 2,080 pictures, 0.096 of these 312
    assert (silent.sum(0) <= 1).all(), silent.sum(0)


def test_a_picture_of_each_kind_is_read(models):
    assert len(drawn.KINDS) >= 40
    check({name: drawn.measure(name, 1, 1000, models) for name in drawn.KINDS}, 1, 0)


@pytest.mark.slow
def test_pictures_of_every_kind_are_read(models):
    table = {name: drawn.measure(name, 4, 2000, models) for name in drawn.KINDS}
    check(table, 4, 0.5)


def own(image: np.ndarray, way: str) -> Image.Image:
    """One of MNIST's images, as a file of it may be."""
    picture = Image.fromarray(image)
    return {
        "light on dark": lambda: picture,
        "dark on light": lambda: ImageOps.invert(picture),
        "border": lambda: ImageOps.expand(picture, 2, 128),
        "cropped": lambda: picture.crop(picture.getbbox()),
        "3 times": lambda: picture.resize((84, 84), Image.Resampling.BICUBIC),
        "20 times": lambda: picture.resize((560, 560), Image.Resampling.NEAREST),
    }[way]()


WAYS = ("light on dark", "dark on light", "border", "cropped", "3 times", "20 times")


def accuracies(models, step: int, way: str) -> tuple[list[float], list[float]]:
    """Of the test images themselves, and of files of them."""
    images, y = dataset.load(dataset.BUNDLED_ROOT, (3, 7), train=False)
    images, y = images[::step], y[::step]
    read = torch.stack([find(own(image.numpy(), way))[0].image for image in images])
    with torch.no_grad():
        pairs = [
            [((model(x) >= 0.5) == (y == 1)).double().mean().item() for model in models] for x in (images / 255, read)
        ]
    return pairs[0], pairs[1]


@pytest.mark.parametrize("way", WAYS[:5])
def test_files_of_some_mnist_images_are_read_as_well_as_the_images(models, way):
    before, after = accuracies(models, 20, way)
    assert all(a > b - 0.015 for a, b in zip(after, before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_files_of_mnist_images_lose_less_than_a_point(models, way):
    before, after = accuracies(models, 6, way)
    assert all(a > b - 0.01 for a, b in zip(after, before, strict=True)), (before, after)


def test_blank_pages_in_uneven_light_have_no_ink():
    random = np.random.default_rng(0)
    for _ in range(12):
        with pytest.raises(NoInkError):
            find(drawn.blank(random))


def test_several_digits_are_counted():
    random = np.random.default_rng(1)
    counts = [len(find(drawn.two_digits(random))) for _ in range(12)]
    assert counts.count(2) >= 10
    assert max(counts) == 2
    left, right = every(drawn.two_digits(np.random.default_rng(1)))
    assert left.box[2] < right.box[0]


def test_the_box_found_is_that_of_the_digit():
    random = np.random.default_rng(2)
    for turn in (0, 1):
        page = drawn.Page(random, (1500, 1100)).write(7)
        picture = page.camera()
        left, top, right, bottom = find(picture.rotate(180) if turn else picture)[0].box
        found = (1500 - right, 1100 - bottom, 1500 - left, 1100 - top) if turn else (left, top, right, bottom)
        assert np.abs(np.array(found) - page.box).max() < 45  # of some 400: the edges of a test image are soft


def seven(mode: str, paper, ink) -> Image.Image:
    """A seven in some mode."""
    mask = Image.fromarray(
        (255 * drawn.Hand(np.random.default_rng(0)).strokes(7, 160, 0.1, drawn.SEVEN)).astype(np.uint8)
    )
    picture = Image.new(mode, (300, 300), paper)
    picture.paste(ink, (80, 60), mask.point(lambda value: 255 * (value > 127)))
    return picture


@pytest.mark.parametrize(
    ("mode", "paper", "ink"),
    [("CMYK", (0, 0, 0, 0), (200, 150, 0, 60)), ("I;16", 60_000, 900), ("1", 1, 0), ("RGB", "yellow", "white")],
)
def test_modes_of_scanners_and_printers_are_read(models, mode, paper, ink, tmp_path):
    seven(mode, paper, ink).save(tmp_path / "seven.tif")
    with Image.open(tmp_path / "seven.tif") as picture:
        (found,) = find(picture)
    assert found.certain
    assert all(model(found.image.unsqueeze(0)) < 0.5 for model in models)


def test_pictures_with_nothing_to_read_say_so():
    two = Image.new("L", (300, 200), 180)
    two.paste(140, (0, 0, 150, 200))
    dot = Image.new("L", (300, 200), 255)
    dot.putpixel((100, 90), 0)
    nothing = [Image.new("RGBA", (90, 90)), Image.new("L", (90, 90)), Image.new("L", (30_000, 3), 255), two]
    for picture in nothing:
        with pytest.raises(NoInkError):
            find(picture)
    for picture in (dot, Image.fromarray(np.tile([0, 255], (9, 9)).astype(np.uint8))):
        with suppress(NoInkError):
            assert not find(picture)[0].certain


@pytest.mark.parametrize("size", [60, 200, 500])
def test_noise_is_remarked(size):
    random = np.random.default_rng(size)
    for _ in range(5):
        (found,) = find(Image.fromarray(random.integers(0, 256, (size, size)).astype(np.uint8)))
        assert not found.certain


def test_files_that_pillow_does_not_open_are_named_for_what_they_are(tmp_path):
    for content, name in {
        b"\0\0\0\x18ftypheic\0\0": "a HEIC photo; save or export it as JPEG",
        b"%PDF-1.7 ": "a PDF; save the page as PNG",
        b"%!PS-Adobe-3.0 EPSF-3.0": "PostScript",
        b"<?xml version='1.0'?>\n<svg xmlns='x'>": "an SVG drawing; export it as PNG",
    }.items():
        (tmp_path / "file").write_bytes(content)
        assert name in foreign(str(tmp_path / "file"))
    (tmp_path / "file").write_bytes(b"hello")
    assert foreign(str(tmp_path / "file")) == ""


def test_a_photo_of_12_megapixels_takes_less_than_half_a_second(tmp_path):
    page = drawn.Page(np.random.default_rng(3), (1000, 750)).write(3)
    page.camera().resize((4000, 3000)).save(tmp_path / "photo.jpg", quality=85)
    times = []
    for _ in range(3):
        start = time.process_time()
        with Image.open(tmp_path / "photo.jpg") as picture:
            (found,) = find(picture)
        assert abs(found.box[0] - 4 * page.box[0]) < 100  # in the pixels of the file
        times.append(time.process_time() - start)
    assert min(times) < 0.5
