"""The folders of runs, ``logs/NAME``, and their checkpoints."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lit_threeseven.errors import UserError
from lit_threeseven.weights import PRETRAINED, UNFINISHED


def find(ckpt_path: str | None, run: str | None = None, logs: Path | None = None) -> Path:
    """The file of a checkpoint.

    Args:
        ckpt_path: A file; "best" or "last" of a run; or the name of a network that ships, such as "LitThreeSeven", or
            "pretrained" for that one. None means "best".
        run: Name of the run; None means the one that saved such a checkpoint last.
        logs: Folder of all runs; None means ``logs``.

    Raises:
        UserError: If it doesn't exist, or both arguments say which file to use.
    """
    logs = Path("logs") if logs is None else logs
    if run is not None and ckpt_path not in (None, "best", "last"):
        raise UserError("--run and --ckpt_path both say what to use; give one of them.")
    shipped = PRETRAINED / f"{'LitThreeSeven' if ckpt_path == 'pretrained' else ckpt_path}.ckpt"
    if ckpt_path and Path(ckpt_path).name == ckpt_path and shipped.is_file():
        return shipped
    if ckpt_path in (None, "best", "last"):
        name = f"{ckpt_path or 'best'}.ckpt"
        found = [folder(logs, run) / "checkpoints" / name] if run else [*logs.glob(f"*/checkpoints/{name}")]
        if not found:
            raise UserError(
                f"No run in {logs.resolve()} has saved a checkpoint; train first, or give a checkpoint's file."
            )
        path = max(found, key=lambda path: path.stat().st_mtime_ns if path.exists() else 0)
    else:
        path = Path(str(ckpt_path)).expanduser()
    if not path.is_file():
        raise UserError(f"There is no checkpoint file {path}; give a file, or best or last of a run.")
    return path


def folder(logs: Path, run: str) -> Path:
    """The folder of a run, which may not exist yet."""
    if not re.fullmatch(r"\w[\w.+=@-]*", run):
        raise UserError(f"--run takes the name of a folder in {logs.resolve()}, such as first-try, got {run!r}.")
    return logs / run


def resumed(ckpt_path: str | None, run: str | None, logs: Path) -> tuple[Path | None, Path | None]:
    """The folder that a fit works in, None if it is a new one, and the checkpoint that it resumes from, if any.

    Args:
        ckpt_path: As in `find`.
        run: Name of the run, which is resumed if it has saved a checkpoint.
        logs: Folder of all runs, an absolute path.

    Raises:
        UserError: If the checkpoint doesn't exist, or if both arguments are given.
    """
    if run and ckpt_path:
        raise UserError("--run and --ckpt_path both say what to resume; give one of them.")
    if run:
        last = folder(logs, run) / "checkpoints" / "last.ckpt"
        return folder(logs, run), last if last.exists() else None
    if not ckpt_path:
        return None, None
    path = find(ckpt_path, None, logs).resolve()
    return path.parents[1] if path.parents[2] == logs else None, path


@contextmanager
def working_in(run: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; leave nothing behind if work fails before a checkpoint is saved."""
    created = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    there, settings = set(run.iterdir()), {path: path.read_bytes() for path in run.glob("*.yaml")}
    saved = {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/*.ckpt")}
    lock = FileLock(run / ".lock")  # the system releases it when this process ends, however it ends
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"Another process is training in {run}; wait for it, or choose another --run.") from error
    for path in run.glob(f"checkpoints/{UNFINISHED.format('*')}"):  # a process was killed while it wrote it
        path.unlink()
    try:
        yield
    except BaseException:
        if saved == {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/*.ckpt")}:
            for path in set(run.iterdir()) - there:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path, content in settings.items():
                path.write_bytes(content)
            for folder in created:
                with suppress(OSError):  # not empty: another run is there
                    folder.rmdir()
        raise
    finally:
        lock.release()
