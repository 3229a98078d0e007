"""The command ``lit-threeseven``, also as ``python -m lit_threeseven``."""

import gc
import logging
import os
import signal
import sys
from importlib import import_module
from types import ModuleType

from lit_threeseven import __version__, commands, signals

HELP = """usage: lit-threeseven [options of fit]
       lit-threeseven COMMAND [options]

Learn to tell handwritten threes from sevens. Without a command it trains, tests, and prints a short table.

train and measure, by Lightning:
  fit         train; saves at most 20 times, and resumes with --run NAME
  validate    measure a checkpoint on held-out images
  test        measure a checkpoint on the test images
  predict     write a checkpoint's answer for each test image

use and check:
{}

lit-threeseven COMMAND --help explains a command's options. --config takes a recipe's name (article, deep or fast) or a
YAML file.

options:
  -h, --help  show this page
  --version   show the version
"""


def main(args: list[str] | None = None) -> None:
    """Run a command; Ctrl-C and SIGTERM end it with one line from the very first moment, a closed pipe silently."""
    try:
        dispatch(sys.argv[1:] if args is None else args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python still writes at exit
        sys.exit(128 + signal.SIGPIPE)


def dispatch(args: list[str]) -> None:
    """Run the command that is named first, or the main job."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.pop("LOCAL_RANK", None)  # a leftover: this process is alone
    signals.take(signals.end)
    signals.hold(False)  # the process that started this one may have held them
    sys.path.append("")  # this folder, where --model may find a class of the user's own
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if there is no home folder, but works
    name = args[0] if args else ""
    if name in ("-h", "--help"):
        print(HELP.format("\n".join(f"  {name:11} {what}" for name, what in commands.COMMANDS.items())).rstrip())
    elif name == "--version":
        print(f"lit-threeseven {__version__}")
    elif name in commands.COMMANDS:
        load(f"lit_threeseven.commands.{name}")
        signals.run(lambda: commands.main(name, args[1:]))
    else:
        cli = load("lit_threeseven.run.cli")  # this takes seconds
        signals.run(lambda: cli.main(args))


def load(name: str) -> ModuleType:
    """Import a module, and torch with it, in less time: garbage collection needn't look at what it makes, which stays.

    It isn't looked at when the program ends, either.
    """
    if name in sys.modules:
        return sys.modules[name]
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        if was_enabled:
            gc.enable()
        gc.freeze()


if __name__ == "__main__":
    main()
