"""Answers for files of pictures, as a table, as CSV or as JSON lines."""

import csv
import io
import itertools
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from lit_threeseven.datamodule import ThreeSevenDataModule
from lit_threeseven.dataset import BUNDLED_DIGITS, BUNDLED_ROOT, load
from lit_threeseven.module import THRESHOLD, LitThreeSeven
from lit_threeseven.pixels import flatten
from lit_threeseven.run.options import UserError
from lit_threeseven.use import pictures
from lit_threeseven.use.explain import ENDING, Explanations
from lit_threeseven.use.find import find as find_digits
from lit_threeseven.use.find import nearest
from lit_threeseven.use.pictures import NoInkError

Format = Literal["table", "csv", "jsonl"]

CHUNK = 64  # pictures that are answered together

# How unlike the nearest training image an image may be: by Euclidean distance, which finds blots, and by one minus the
# cosine, which finds marks with little ink. Of the test images one in two hundred exceeds each.
UNLIKE = (7.0, 0.283)

UNREADABLE = "can't be read: "


@dataclass
class Answer:
    """What is said of a file.

    Attributes:
        file: Its path.
        digit: The digit that it shows; None if it can't be read or shows nothing.
        probability: Of that digit, 0.5 to 1.
        remark: Why there is no digit, or what else one should know.
    """

    file: str
    digit: int | None = None
    probability: float | None = None
    remark: str = ""


def add_options(parser: Any) -> None:
    """Add the command line's options for pictures to a parser of jsonargparse."""
    paths = "Pictures to answer: files, folders, or - for a list of them on standard input."
    explain = "Folder for a figure of each picture: how the network sees it, and what each pixel contributes."
    parser.add_argument("paths", nargs="*", metavar="PATH", help=paths)
    parser.add_argument("--format", type=Format, default="table", help="Form of the answers for pictures.")
    parser.add_argument("--explain", type=str | None, metavar="FOLDER", help=explain)


def find(paths: Iterable[str]) -> list[str]:
    """Files of pictures: the given ones, those in given folders and their folders, and for "-" those that it lists.

    In a folder they are known by their ending, and explanations are left out. A folder that is empty or can't be read
    is given as if it were a file.
    """
    files: list[str] = []
    for path in paths:
        if path == "-":
            files += itertools.chain.from_iterable(
                map(_inside, filter(None, (line.rstrip("\r\n") for line in sys.stdin)))
            )
        else:
            files += _inside(path)
    return files


def _inside(path: str) -> Iterator[str]:
    if not Path(path).is_dir():
        yield path
        return
    found: list[str] = []
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in {*Image.OPEN, "MPO"}}
    endings |= pictures.FOREIGN_ENDINGS
    for folder, folders, names in os.walk(path, onerror=lambda error: found.append(error.filename)):
        folders.sort()
        chosen = (name for name in sorted(names) if Path(name).suffix.lower() in endings)
        found.extend(str(Path(folder, name)) for name in chosen if not name.endswith(ENDING))
    yield from found or [path]


def answers(model: LitThreeSeven, files: list[str]) -> Iterator[tuple[Answer, Tensor | None]]:
    """The answer for each file, in order, with the image as the network sees it, ``(28, 28)``, if there is one.

    Args:
        model: A network in evaluation mode.
        files: Paths; only `CHUNK` pictures are in memory at once.
    """
    first, second = model.digits
    for start in range(0, len(files), CHUNK):
        read = [(file, *_read(file)) for file in files[start : start + CHUNK]]
        x = torch.stack([torch.zeros(28, 28) if image is None else image for _, image, _ in read])
        with torch.no_grad():
            probabilities, strange = model(x).flatten().tolist(), unlike(x, model.digits).tolist()
        known = set(model.digits) == set(BUNDLED_DIGITS)
        for (file, image, remark), p, odd, like in zip(read, probabilities, strange, nearest(x)[1], strict=True):
            if image is None:
                yield Answer(file, remark=remark), None
            else:
                digit = first if p >= THRESHOLD else second
                doubt = "unlike all training images" if odd else f"uncertain: most like a {like}"
                remarks = [*filter(None, [remark]), *[doubt] * (odd or (known and int(like) != digit))]
                yield Answer(file, digit, max(p, 1 - p), ", ".join(remarks)), image


def _read(file: str) -> tuple[Tensor | None, str]:
    """The image in a file, or None, and a remark."""
    try:
        if Path(file).is_dir():
            next(Path(file).iterdir(), None)  # which says why, if it can't be read
            raise OSError("there are no pictures in it")
        if Path(file).exists() and not Path(file).is_file():  # reading a pipe could take forever
            raise OSError("it is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=pictures.formats()) as picture:
                frames = getattr(picture, "n_frames", 1)
                marks = find_digits(picture)
                if len(marks) > 1:
                    return None, f"there are {len(marks)} marks"
                return marks[0].image, f"the first of {frames} frames" if frames > 1 else ""
    except NoInkError as error:
        return None, str(error)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return None, f"{UNREADABLE}it has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except Exception as error:  # which one Pillow raises depends on the damage
        known = not isinstance(error, UnidentifiedImageError)
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        return None, f"{UNREADABLE}{why if known else pictures.foreign(file) or 'it is not a picture, or is damaged'}"


@cache
def _training_images() -> tuple[Tensor, Tensor]:
    """All of them, ``(N, 784)``, and their lengths as vectors, ``(N,)``."""
    images = flatten(load(BUNDLED_ROOT, BUNDLED_DIGITS, train=True)[0])
    return images, images.norm(dim=1)


def unlike(x: Tensor, digits: tuple[int, int]) -> Tensor:
    """Which images, ``(N, 28, 28)``, are unlike all training images, ``(N,)``; none if these are not at hand."""
    if set(digits) != set(BUNDLED_DIGITS):
        return torch.zeros(len(x), dtype=torch.bool)
    images, lengths = _training_images()
    products, length = x.flatten(1) @ images.t(), x.flatten(1).norm(dim=1, keepdim=True)
    distance = (length**2 + lengths**2 - 2 * products).amin(1).clamp(min=0).sqrt()
    cosine = (products / (length * lengths).clamp(min=1e-9)).amax(1)
    return (distance > UNLIKE[0]) | (1 - cosine > UNLIKE[1])


def report(model: LitThreeSeven, paths: list[str], form: Format = "table", explain: str | None = None) -> None:
    """Print the answers for pictures.

    Args:
        model: A network in evaluation mode.
        paths: As for `find`.
        form: "table" for people; "csv"; "jsonl", a JSON object per line.
        explain: Folder for a picture of each file's image, with each pixel's contribution; made if it is not there.

    Raises:
        ValueError: If a list has no files, or an explanation can't be written.
        UserError: If files can't be read, when all others have been answered.
    """
    files, unreadable = find(paths), 0
    if not files:
        raise ValueError("There are no pictures in the list on standard input.")
    explanations = Explanations(Path(explain), files) if explain else None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a name may be any bytes
    columns, lines = shutil.get_terminal_size()  # left to tqdm, a terminal that doesn't tell it stays empty
    options = {"ncols": columns, "nrows": lines, "leave": False, "delay": 1, "disable": not sys.stderr.isatty()}
    head = {"table": "digit  probability  file", "csv": ",".join(field.name for field in fields(Answer))}
    try:
        with tqdm(files, "Pictures", **options) as bar:
            if form in head:
                tqdm.write(head[form])
            for answer, image in answers(model, files):
                tqdm.write(_line(answer, form))
                unreadable += answer.remark.startswith(UNREADABLE)
                if explanations and image is not None:
                    title = f"{printable(Path(answer.file).name)}: a {answer.digit}, {answer.probability:.2%}"
                    explanations.save(model, answer.file, image, title)
                bar.update()
    except BrokenPipeError:  # whoever read the answers has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if unreadable:
        raise UserError(f"{unreadable:,} of the pictures can't be read.")


def _line(answer: Answer, form: Format) -> str:
    if form == "jsonl":
        return json.dumps(asdict(answer))
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(asdict(answer).values())
        return text.getvalue()
    digit = "?" if answer.digit is None else answer.digit
    probability = "" if answer.probability is None else f"{answer.probability:.2%}"
    return f"{digit:>5}  {probability:>11}  {printable(answer.file)}" + f"  ({answer.remark})" * bool(answer.remark)


def table(batches: list[dict[str, Tensor]], data: ThreeSevenDataModule) -> tuple[str, int, int]:
    """A Trainer's predictions of test images as CSV, how many of them are right, and how many there are."""
    names = ("rows", "digit", "probability")
    rows, digit, probability = (torch.cat([batch[name] for batch in batches]).cpu() for name in names)
    order = rows.argsort()
    rows, digit, probability = rows[order], digit[order], probability[order]
    first, second = data.digits
    _, y = data.test[rows]  # limit_predict_batches may be given
    truth = torch.where(y == 1, first, second)
    lines = [f"image,truth,digit,probability of {first}\n"]
    for row in torch.cat([rows.unsqueeze(1), truth, digit, probability.double()], dim=1).tolist():
        lines.append("{:.0f},{:.0f},{:.0f},{:.9g}\n".format(*row))
    return "".join(lines), int((digit == truth).sum()), len(truth)


def printable(name: str) -> str:
    """A file's name without what could upset a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
