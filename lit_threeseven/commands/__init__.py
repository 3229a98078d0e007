"""The light commands: each module has a function of its own name, whose arguments are the options, and `show`."""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, get_args, get_origin

COMMANDS = {
    "recognize": "say which digit pictures show",
    "sweep": "train many networks at once, with different learning rates and starts",
    "export": "write a trained network for other programs, or as a page to draw on",
    "verify": "check that a machine or a cluster trains to the published bits",
}


def main(name: str, args: list[str]) -> None:
    """Run a command; a user's mistake ends it with a sentence and exit code 1."""
    from jsonargparse import ArgumentError, ArgumentParser

    module = import_module(f"{__name__}.{name}")
    function, show = getattr(module, name), module.show
    about = inspect.cleandoc(function.__doc__).partition("\nArgs:")[0].strip()
    parser = ArgumentParser(prog=f"lit-threeseven {name}", description=about, exit_on_error=False)
    try:
        names, others = add_options(parser, function), add_options(parser, show)
        given = parser.parse_args(args)
        result = function(**{name: given[name] for name in names})
        show(result, **{name: given[name] for name in others})
    except ArgumentError as error:
        sys.exit(f"lit-threeseven: error: {' '.join(str(error).split())} (see lit-threeseven {name} --help)")
    except ImportError as error:
        sys.exit(f"lit-threeseven: error: {error}; install what is missing: pip install 'lit_threeseven[export]'")
    except (OSError, ValueError) as error:
        sys.exit(f"lit-threeseven: error: {error}")


def add_options(parser: Any, function: Callable[..., Any]) -> list[str]:
    """Make options of a function's arguments and their docstring; gives their names, without `show`'s `result`.

    A list without a default takes what has no option; one with a default is written with commas, as in 0.1,1,10; and
    what is False by default is switched on.
    """
    from docstring_parser import parse

    help_ = {entry.arg_name: entry.description for entry in parse(function.__doc__ or "").params}
    names, simple = [], []
    for parameter in inspect.signature(function).parameters.values():
        name, kinds = parameter.name, (parameter.annotation, *get_args(parameter.annotation))
        items = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), None)
        if name == "result":
            continue
        names.append(name)
        if items and parameter.default is parameter.empty:
            parser.add_argument(name, nargs="+", type=items, metavar=name[:-1].upper(), help=help_[name])
        elif items:
            parser.add_argument(f"--{name}", type=_commas(items), default=parameter.default, help=help_[name])
        elif parameter.default is False:
            parser.add_argument(f"--{name}", action="store_true", help=help_[name])
        else:
            simple.append(name)
    parser.add_function_arguments(
        function, as_positional=True, skip=set(inspect.signature(function).parameters) - {*simple}
    )
    return names


def _commas(kind: type) -> Callable[[Any], Any]:
    def numbers(text: Any) -> Any:
        return [kind(part) for part in text.split(",")] if isinstance(text, str) else text

    return numbers
