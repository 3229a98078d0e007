"""Picture files: find them in folders, open them, and find the digits in them."""

import itertools
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lit_threeseven.use import pictures
from lit_threeseven.use.find import Found, every
from lit_threeseven.use.pictures import NoInkError

EXPLAINED = ".explained.png"  # ending of figures that `Explanations` writes
UNREADABLE = "can't be read: "


def find(paths: Iterable[str]) -> list[str]:
    """Picture files: given files, those in given folders and subfolders, and for "-" those listed on standard input.

    In a folder, pictures are recognized by their ending, and explanations are left out. A folder that is empty or can't
    be read is returned as if it were a file.
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
        found.extend(str(Path(folder, name)) for name in chosen if not name.endswith(EXPLAINED))
    yield from found or [path]


def read(file: str) -> tuple[list[Found], str]:
    """The digits in a file, from left to right, and a remark."""
    try:
        if Path(file).is_dir():
            next(Path(file).iterdir(), None)  # its error says why the folder can't be read
            raise OSError("there are no pictures in it")
        if Path(file).exists() and not Path(file).is_file():  # reading a pipe could take forever
            raise OSError("it is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=pictures.formats()) as picture:
                frames = getattr(picture, "n_frames", 1)
                return every(picture), f"the first of {frames} frames" if frames > 1 else ""
    except NoInkError as error:
        return [], str(error)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return [], f"{UNREADABLE}it has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except Exception as error:  # which one Pillow raises depends on the damage
        known = not isinstance(error, UnidentifiedImageError)
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        return [], f"{UNREADABLE}{why if known else pictures.foreign(file) or 'it is not a picture, or is damaged'}"
