"""`recognize`: which digit pictures show; with torch, numpy and Pillow alone, to answer soon."""

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pydoc import locate
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from lit_threeseven import runs
from lit_threeseven.dataset import BUNDLED_DIGITS
from lit_threeseven.errors import UserError
from lit_threeseven.functional import THRESHOLD, layers, sigmoid
from lit_threeseven.use.files import UNREADABLE, find, read
from lit_threeseven.use.find import Found, bundled_images
from lit_threeseven.weights import read as read_checkpoint

UNSURE = 0.1  # fraction of the test images of which a network is less sure than usual


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
        checkpoint = read_checkpoint(path)
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

    @property
    def b(self) -> Tensor:
        """The single layer's; an AttributeError with hidden layers, which have several."""
        if len(self.parameters) > 2:
            raise AttributeError("b")
        return self.parameters[1]

    def __call__(self, x: Tensor) -> Tensor:
        """As `LitThreeSeven.forward`."""
        return sigmoid(self.logits(x))


def recognize(
    paths: list[str],
    model: str | None = None,
    ckpt_path: str | None = None,
    run: str | None = None,
    explain: str | None = None,
    all: bool = False,
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
        explain: Folder for a figure of each picture: where the digit is, how the network sees it, and what each pixel
            contributes.
        all: Answer each mark of a picture that has several, with its box: left, top, right and bottom.

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
    return Answers(network, files, explanations, all)


class Answers:
    """The answers for files; each pass makes them anew.

    Args:
        network: A `Network`, or a `LitThreeSeven` in evaluation mode.
        files: Paths of pictures.
        explanations: Where figures go, if there are to be any.
        all: Whether each mark of a picture with several is answered.
    """

    def __init__(self, network: Any, files: list[str], explanations: Any = None, all: bool = False) -> None:
        self.network, self.files, self.explanations, self.all = network, files, explanations, all
        self.limit = usual(network)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Answer]:
        for file in self.files:
            for answer, found in answers(self.network, file, self.limit, self.all):
                if self.explanations and found:
                    title = f"{printable(Path(file).name)}: a {answer.digit}, {answer.probability:.2%}"
                    self.explanations.save(self.network, file, found, title)
                yield answer


def choose(model: str | None, ckpt_path: str | None, run: str | None) -> Any:
    """The network that `recognize` is asked for."""
    if model and "." in model and model.rpartition(".")[0] != "lit_threeseven.networks":
        kind: Any = locate(model)
        if kind is None:
            raise UserError(f"There is no class {model}; give its module and name, such as nets.Mine.")
        from lit_threeseven import LitThreeSeven  # as the class has done

        if not (isinstance(kind, type) and issubclass(kind, LitThreeSeven)):
            raise UserError(f"{model} is no subclass of LitThreeSeven, whose probabilities are answers.")
        return kind.load_from_checkpoint(runs.find(ckpt_path, run)).eval()
    shipped = (model or "LitThreeSeven").rpartition(".")[2]
    return Network.load(runs.find(ckpt_path if ckpt_path or run else shipped, run))


def answers(network: Any, file: str, limit: float, all: bool = False) -> Iterator[tuple[Answer, Found | None]]:
    """The answer for a file, or for each of its marks, with what was found.

    Args:
        network: A `Network`, or a `LitThreeSeven` in evaluation mode.
        file: Its path.
        limit: As `usual` gives it.
        all: Whether a picture with several marks gets an answer for each; otherwise it gets none.
    """
    found, note = read(file)
    if len(found) > 1 and not all:
        found, note = [], f"there are {len(found)} marks; --all answers each"
    if not found:
        yield Answer(file, remark=note), None
        return
    first, second = network.digits
    with torch.no_grad():
        probabilities = network(torch.stack([one.image for one in found])).flatten().tolist()
    for one, p in zip(found, probabilities, strict=True):
        digit = first if p >= THRESHOLD else second
        where = "box {} {} {} {}".format(*one.box) if len(found) > 1 else ""
        yield Answer(file, digit, max(p, 1 - p), ", ".join(filter(None, [note, where, doubt(one, p, limit)]))), one


def usual(network: Any) -> float:
    """The probability of its answer that a network exceeds for nine in ten test images; 0 if it knows other digits."""
    if set(network.digits) != set(BUNDLED_DIGITS):
        return 0
    with torch.no_grad():
        p = network(bundled_images("t10k"))
    return float(torch.maximum(p, 1 - p).quantile(UNSURE))


def doubt(found: Found, p: float, limit: float) -> str:
    """Why an answer may be wrong.

    Args:
        found: The digit in the picture.
        p: The network's probability of the first digit.
        limit: As `usual` gives it; 0 for no doubt at all, as training images and test images say nothing then.

    Returns:
        "unlike all training images", "less sure than usual", or nothing.
    """
    if limit and not found.certain:
        return "unlike all training images"
    return "less sure than usual" * (max(p, 1 - p) < limit)


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
    # left to tqdm, a terminal that doesn't report its size stays empty; Python 3.10 says that it is 0 × 0
    columns, lines = shutil.get_terminal_size()
    size = {"ncols": columns or 80, "nrows": lines or 24}
    options = {**size, "leave": False, "delay": 1, "disable": not sys.stderr.isatty()}
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
