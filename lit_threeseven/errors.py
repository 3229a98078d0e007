"""What a user can fix."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can fix; the message is a sentence that says what was given and what to do."""


class DivergedError(UserError, FloatingPointError):
    """Training led to weights that are not finite."""


@contextmanager
def needed(what: str, package: str) -> Iterator[None]:
    """End the program with one sentence, and exit code 1, if an import in this context finds no such module.

    Example:
        >>> with needed("NumPy", "numpy"):
        ...     import numpy
    """
    try:
        yield
    except ModuleNotFoundError:
        sys.exit(f"This example needs {what}: pip install '{package}'")
