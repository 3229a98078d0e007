"""`recognize`: which digit pictures show; with torch, numpy and Pillow alone, to answer soon."""

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
from pydoc import locate
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from lit_threeseven import runs
from lit_threeseven.dataset import BUNDLED_DIGITS, BUNDLED_ROOT, raw_folder
from lit_threeseven.errors import UserError
from lit_threeseven.functional import THRESHOLD, layers, sigmoid
from lit_threeseven.pixels import flatten
from lit_threeseven.use.pictures import NoInkError, normalize
from lit_threeseven.weights import read

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


@dataclass
class Network:
    """A trained network without Lightning: calling it gives what `LitThreeSeven.forward` does.

    Attributes:
        parameters: `W1`, `b1`, `W2`, …, or `W` and `b`.
        digits: The two digits that it tells apart.
    """

    parameters: list[Tensor]
    digits: tuple[int, int]

    @classmethod
    def load(cls, path: Path) -> "Network":
        """That of a checkpoint of `LitThreeSeven` or `LitThreeSevenMLP`; raises UserError for another one."""
        checkpoint = read(path)
        kind = str(checkpoint.get("network", "LitThreeSeven")).rpartition(".")[2]
        if kind not in ("LitThreeSeven", "LitThreeSevenMLP"):
            raise UserError(f"{path} holds {checkpoint['network']}; say so, with --model {checkpoint['network']}.")
        parameters = [*checkpoint["state_dict"].values()]
        inputs = 784
        for W, b in zip(parameters[::2], parameters[1::2], strict=len(parameters) > 0):
            if W.shape != (inputs, len(b)) or b.ndim != 1 or not (W.isfinite().all() and b.isfinite().all()):
                raise UserError(f"{path} can't be used: it holds no layers of finite weights from 784 pixels to one.")
            inputs = len(b)
        if inputs != 1:
            raise UserError(f"{path} can't be used: it holds no layers of finite weights from 784 pixels to one.")
        first, second = checkpoint.get("hyper_parameters", {}).get("digits", BUNDLED_DIGITS)
        return cls(parameters, (int(first), int(second)))

    def logits(self, x: Tensor) -> Tensor:
        """As `LitThreeSeven.logits`."""
        return layers(x, self.parameters)

    def __call__(self, x: Tensor) -> Tensor:
        """As `LitThreeSeven.forward`."""
        return sigmoid(self.logits(x))


def recognize(
    paths: list[str],
    model: str | None = None,
    ckpt_path: str | None = None,
    run: str | None = None,
    explain: str | None = None,
) -> "Answers":
    """Say which digit pictures show.

    Any picture that Pillow reads will do, of one digit on plain or ruled paper. The exit code is 1 if a file can't be
    read.

    Args:
        paths: Pictures: files, folders, or - for a list of them on standard input.
        model: LitThreeSeven or LitThreeSevenMLP for a network that ships (the first by default), or your own class,
            such as nets.Mine, with its checkpoint.
        ckpt_path: A checkpoint's file, or best or last of the newest run.
        run: Name of a run, whose best network to use.
        explain: Folder for a figure of each picture: how the network sees it, and what each pixel contributes.

    Returns:
        An answer for each file, in order, made when it is asked for.

    Raises:
        UserError: If a list has no files, there is no such network, or an explanation can't be written.
    """
    files = find(paths)
    if not files:
        raise UserError("There are no pictures in the list on standard input.")
    network = choose(model, ckpt_path, run)
    explanations = None
    if explain:
        from lit_threeseven.use.explain import Explanations  # takes a second

        explanations = Explanations(Path(explain), files)
    return Answers(network, files, explanations)


class Answers:
    """The answers for files; each pass makes them anew.

    Args:
        network: A `Network`, or a `LitThreeSeven` in evaluation mode.
        files: Paths of pictures.
        explanations: Where figures go, if there are to be any.
    """

    def __init__(self, network: Any, files: list[str], explanations: Any = None) -> None:
        self.network, self.files, self.explanations = network, files, explanations

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Answer]:
        for answer, image in answers(self.network, self.files):
            if self.explanations and image is not None:
                title = f"{printable(Path(answer.file).name)}: a {answer.digit}, {answer.probability:.2%}"
                self.explanations.save(self.network, answer.file, image, title)
            yield answer


def choose(model: str | None, ckpt_path: str | None, run: str | None) -> Any:
    """The network that `recognize` is asked for."""
    if model and "." in model and model.rpartition(".")[0] != "lit_threeseven.networks":
        kind: Any = locate(model)
        if kind is None:
            raise UserError(f"There is no class {model}; give its module and name, such as nets.Mine.")
        return kind.load_from_checkpoint(runs.find(ckpt_path, run)).eval()
    shipped = (model or "LitThreeSeven").rpartition(".")[2]
    return Network.load(runs.find(ckpt_path if ckpt_path or run else shipped, run))


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
    for folder, folders, names in os.walk(path, onerror=lambda error: found.append(error.filename)):
        folders.sort()
        pictures = (name for name in sorted(names) if Path(name).suffix.lower() in endings)
        found.extend(str(Path(folder, name)) for name in pictures if not name.endswith(".explained.png"))
    yield from found or [path]


def answers(model: Any, files: list[str]) -> Iterator[tuple[Answer, Tensor | None]]:
    """The answer for each file, in order, with the image as the network sees it, ``(28, 28)``, if there is one.

    Args:
        model: A `Network`, or a `LitThreeSeven`.
        files: Paths; only `CHUNK` pictures are in memory at once.
    """
    first, second = model.digits
    for start in range(0, len(files), CHUNK):
        read = [(file, *_read(file)) for file in files[start : start + CHUNK]]
        x = torch.stack([torch.zeros(28, 28) if image is None else image for _, image, _ in read])
        with torch.no_grad():
            probabilities, strange = model(x).flatten().tolist(), unlike(x, model.digits).tolist()
        for (file, image, remark), p, odd in zip(read, probabilities, strange, strict=True):
            if image is None:
                yield Answer(file, remark=remark), None
            else:
                remarks = [*filter(None, [remark]), *["unlike all training images"] * odd]
                yield Answer(file, first if p >= THRESHOLD else second, max(p, 1 - p), ", ".join(remarks)), image


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
            with Image.open(file) as picture:
                frames = getattr(picture, "n_frames", 1)
                return normalize(picture), f"the first of {frames} frames" if frames > 1 else ""
    except NoInkError as error:
        return None, str(error)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return None, f"{UNREADABLE}it has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except Exception as error:  # which one Pillow raises depends on the damage
        known = not isinstance(error, UnidentifiedImageError)
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        return None, f"{UNREADABLE}{why if known else 'it is not a picture, or is damaged'}"


@cache
def _training_images() -> tuple[Tensor, Tensor]:
    """All of them, ``(N, 784)``, and their lengths as vectors, ``(N,)``."""
    content = (raw_folder(BUNDLED_ROOT) / "train-images-idx3-ubyte").read_bytes()
    images = flatten(torch.from_numpy(np.frombuffer(content, np.uint8, offset=16).reshape(-1, 784).copy()))
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


def show(result: Answers, format: Literal["table", "csv", "jsonl"] = "table") -> None:
    """Print answers as they come.

    Args:
        result: Those of `recognize`.
        format: Form of the answers: table is for people; jsonl has a JSON object per line.

    Raises:
        UserError: If files can't be read, when all others have been answered.
    """
    unreadable = 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a name may be any bytes
    columns, lines = shutil.get_terminal_size()  # left to tqdm, a terminal that doesn't tell it stays empty
    options = {"ncols": columns, "nrows": lines, "leave": False, "delay": 1, "disable": not sys.stderr.isatty()}
    head = {"table": "digit  probability  file", "csv": ",".join(field.name for field in fields(Answer))}
    try:
        for i, answer in enumerate(tqdm(result, "Pictures", **options)):
            if not i and format in head:
                tqdm.write(head[format])
            tqdm.write(_line(answer, format))
            unreadable += answer.remark.startswith(UNREADABLE)
    except BrokenPipeError:  # whoever read the answers has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if unreadable:
        raise UserError(f"{unreadable:,} of the pictures can't be read.")


def _line(answer: Answer, form: str) -> str:
    if form == "jsonl":
        return json.dumps(asdict(answer))
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(asdict(answer).values())
        return text.getvalue()[:-1]
    digit = "?" if answer.digit is None else answer.digit
    probability = "" if answer.probability is None else f"{answer.probability:.2%}"
    return f"{digit:>5}  {probability:>11}  {printable(answer.file)}" + f"  ({answer.remark})" * bool(answer.remark)


def printable(name: str) -> str:
    """A file's name without what could upset a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
