"""The light commands: each module has a function of the same name, whose arguments are the options, and `show`."""

import inspect
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, NoReturn, get_args, get_origin

from lit_threeseven.errors import UserError

COMMANDS = {
    "recognize": "say which digit pictures show",
    "sweep": "train many networks at once, with different learning rates and starts",
    "export": "save a trained network for other programs, or as a web page to draw on",
    "verify": "check that a machine or a cluster trains to the published bits",
}


def main(name: str, args: list[str]) -> None:
    """Run a command; a user's mistake ends it with one sentence and exit code 1."""
    module = import_module(f"{__name__}.{name}")
    function, show = getattr(module, name), module.show
    about = inspect.cleandoc(function.__doc__).partition("\nArgs:")[0].strip()
    parser = Parser(prog=f"lit-threeseven {name}", description=about)
    try:
        names, others = parser.add_function(function), parser.add_function(show)
        given = vars(parser.parse_intermixed_args(args))
        result = function(**{name: given[name] for name in names})
        show(result, **{name: given[name] for name in others})
    except ImportError as error:
        sys.exit(f"lit-threeseven: error: {error}; install what is missing: pip install 'lit_threeseven[export]'")
    except OSError as error:
        place = "; choose another place with --out" if "out" in inspect.signature(function).parameters else ""
        sys.exit(f"lit-threeseven: error: {error.filename} can't be used ({error.strerror}){place}")
    except ValueError as error:
        sys.exit(f"lit-threeseven: error: {error}")


class Parser(ArgumentParser):
    """An `ArgumentParser` that makes options from functions, and raises a UserError for a wrong option."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise UserError(f"{message} ({self.prog} --help explains every option)")

    def add_function(self, function: Callable[..., Any]) -> list[str]:
        """Make options from a function's arguments, types and docstring; return their names, without `result`.

        Arguments without a default become positional; a list then takes any number of values. As an option, a list is
        text with commas.
        """
        from docstring_parser import parse

        texts = {entry.arg_name: entry.description or "" for entry in parse(function.__doc__ or "").params}
        parameters = [p for name, p in inspect.signature(function).parameters.items() if name != "result"]
        for parameter in parameters:
            kinds = [parameter.annotation, *get_args(parameter.annotation)]
            items = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), None)
            options: dict[str, Any] = {"help": texts[parameter.name]}
            if get_origin(parameter.annotation) is Literal:
                options["choices"] = get_args(parameter.annotation)
            if parameter.default is parameter.empty:
                self.add_argument(parameter.name, nargs="+" if items else None, **options)
                continue
            if parameter.default is False:
                options["action"] = "store_true"
            else:
                kind = next((kind for kind in (str, int, float) if kind in kinds), str)
                options |= {"type": _commas(items) if items else kind, "default": parameter.default}
                if parameter.default is not None:
                    default = ",".join(map(str, parameter.default)) if items else parameter.default
                    options["help"] += f" (default: {default})"
            self.add_argument(f"--{parameter.name}", **options)
        return [parameter.name for parameter in parameters]


def _commas(kind: type) -> Callable[[str], list[Any]]:
    def numbers(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return numbers
