"""The command ``lit-threeseven``, also as ``python -m lit_threeseven``."""

import os
import signal
import sys
from typing import Any

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


def end(signum: int, frame: Any) -> None:
    """End at once: an exception in the middle of an import may be lost, or come out as another one."""
    first = (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0"
    if first:
        os.write(2, f"lit-threeseven: Stopped by {SIGNALS[signal.Signals(signum)]}.\n".encode())
    os._exit(128 + signum if first else 0)


def hold(yes: bool) -> None:
    """Hold signals back, here and in processes started from here, until they are let through (not on Windows)."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK if yes else signal.SIG_UNBLOCK, SIGNALS)


def main() -> None:
    """Run the command line; Ctrl-C and SIGTERM end it with one line from the very first moment."""
    for signum in SIGNALS:
        signal.signal(signum, end)
    hold(False)  # which the process that started this one may have held
    from lit_threeseven.run import checkpoints, cli  # this takes seconds

    def stop(signum: int, frame: Any) -> None:
        raise checkpoints.Stopped(signum)

    for signum in SIGNALS:
        signal.signal(signum, stop)
    try:
        cli.main()
    except checkpoints.Stopped as stopped:  # by another signal, while it said its last words
        sys.exit(stopped.exit_code)
    finally:
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_DFL)


if __name__ == "__main__":
    main()
