"""Errors that a user can fix, each in one sentence; warnings that nobody can act on, silenced."""

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class UserError(ValueError):
    """Something the user can fix; the message is a sentence that says what was given and what to do."""


class DivergedError(UserError, FloatingPointError):
    """Training gave weights that are not finite."""


def check_positive(**numbers: float) -> None:
    """Raise a UserError, which gives name and value, for a number that is not finite and above 0 in float32."""
    for name, value in numbers.items():
        with suppress(OverflowError):
            if hasattr(value, "__float__") and 1e-45 <= float(value) <= 3.4028235e38:
                continue
        raise UserError(f"{name} must be a finite float32 above 0, got {value}.")


@contextmanager
def needed(what: str, package: str) -> Iterator[None]:
    """End the program with one sentence and exit code 1 if an import in this context fails because a module is missing.

    Example:
        >>> with needed("NumPy", "numpy"):
        ...     import numpy
    """
    try:
        yield
    except ModuleNotFoundError:
        sys.exit(f"This example needs {what}: pip install '{package}'")


def silence_libraries() -> None:
    """Silence what nobody at the terminal can act on, and print other warnings on one line each."""
    warnings.formatwarning = lambda message, *_, **__: f"lit-threeseven: warning: {' '.join(str(message).split())}\n"
    # of TensorBoard's writer: an error that stops it is also raised in the main thread
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else threading.__excepthook__(args)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "LeafSpec.*is deprecated",
        ".*torch.jit.trace.* is deprecated",  # TensorBoard's writer uses it to trace the graph
        "smaller than the logging interval",  # a full batch is one batch per epoch
        "configure_optimizers` will be overridden",  # by --optimizer, as requested
        "callbacks used to create the checkpoint need to be provided",  # not for test or predict
        "across ranks is zero",  # val_fraction=0
        "was called before the ``update`` method",  # a process without a share
        "Checkpoint directory .* exists and is not empty",  # a resumed run
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")
