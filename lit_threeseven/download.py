"""All of MNIST from its mirrors, complete or not at all."""

import shutil
import socket
import tempfile
from pathlib import Path

from lit_threeseven.dataset import FILES, raw_folder, read
from lit_threeseven.errors import UserError


def download(root: str | Path) -> None:
    """Download all of MNIST with torchvision, unless it is already there.

    A download is completed and checked before any of it appears in ``root``, so several processes may prepare the same
    folder at once, and an interrupted download leaves no partial file.

    Raises:
        UserError: If the files can't be downloaded, or arrive damaged.
    """
    from torchvision.datasets import MNIST

    raw = raw_folder(root)
    if all((raw / name).exists() for name in FILES):
        return
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer
    try:
        disk = next(folder for folder in (raw, *raw.parents) if folder.exists())
        with tempfile.TemporaryDirectory(prefix=".download-", dir=disk) as staging:
            staged = raw_folder(staging)
            staged.mkdir(parents=True)
            for archive in raw.glob("*-ubyte.gz"):
                shutil.copy(archive, staged)
            MNIST(staging, download=True)
            for train in (True, False):
                read(staging, train)
            raw.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                (staged / name).replace(raw / name)
    except Exception as error:  # a mirror's answer may fail in urllib, gzip or torchvision
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(
            f"MNIST could not be downloaded to {raw} ({reason}). Put its four files there yourself "
            f'({", ".join(FILES)}, or their .gz archives), or use source="bundled".'
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
