"""Ctrl-C and SIGTERM: they end the program at once while it starts; in training, `LastCheckpoint` saves first."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(SystemExit):
    """A signal stopped the run: at once, or after everything needed to resume it was saved to `checkpoint`."""

    def __init__(self, signum: int, epochs: int = 0, checkpoint: str = "") -> None:
        self.what = f"Stopped by {SIGNALS.get(signum, 'a signal')}"
        self.what += f" after {count(epochs)}; all progress is saved." if checkpoint else "."
        self.checkpoint, self.exit_code = checkpoint, 128 + (signum or signal.SIGTERM)
        super().__init__(f'{self.what} To resume, use ckpt_path="{checkpoint}".' if checkpoint else self.what)


def count(epochs: int) -> str:
    """A number of epochs in words."""
    return f"{epochs:,} epoch{'' if epochs == 1 else 's'}"


def take(handler: Callable[[int, Any], Any] | signal.Handlers) -> None:
    """Let a function handle both signals."""
    for signum in SIGNALS:
        signal.signal(signum, handler)


def end(signum: int, frame: Any) -> None:
    """End at once: an exception in the middle of an import may be lost, or turn into another one."""
    if not local_rank():
        os.write(2, f"lit-threeseven: {Stopped(signum).what}\n".encode())
    os._exit(0 if local_rank() else 128 + signum)  # the process that started this one takes other codes for failures


def stop(signum: int, frame: Any) -> None:
    """Raise `Stopped`, so that unfinished work is cleaned up."""
    raise Stopped(signum)


def hold(yes: bool) -> None:
    """Hold both signals back, here and in processes started from here, or let them through (not on Windows)."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK if yes else signal.SIG_UNBLOCK, SIGNALS)


def local_rank() -> int:
    """Number of this process on its machine; 0 if it is alone."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def run(program: Callable[[], None]) -> None:
    """Run a program whose imports are done; a signal ends it with one line, once its work is cleaned up."""
    take(stop)
    try:
        program()
    except Stopped as stopped:
        if not local_rank():
            print(f"lit-threeseven: {stopped.what}", file=sys.stderr)
        sys.exit(0 if local_rank() else stopped.exit_code)
    finally:
        take(signal.SIG_DFL)
