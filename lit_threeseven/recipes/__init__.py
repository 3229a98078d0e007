"""Recipes: the YAML files of this folder, which ``--config`` takes by name, such as ``--config fast``."""

import re
from itertools import pairwise
from pathlib import Path

import yaml

from lit_threeseven.errors import UserError

FOLDER = Path(__file__).parent


def with_files(args: list[str]) -> list[str]:
    """Replace recipes' names after ``--config`` by their files; refuse a file that is not plain YAML."""
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    for i, (option, name) in enumerate(pairwise(args), 1):
        if option != "--config":
            continue
        if re.fullmatch(r"\w+", name) and not Path(name).exists():
            args[i] = str(FOLDER / f"{name}.yaml")
            if not Path(args[i]).exists():
                known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
                raise UserError(f"There is no recipe {name}; there are {known}, and --config takes a YAML file too.")
        try:
            text = Path(args[i]).read_text("utf-8")
            if sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)) > 20:  # they multiply
                raise ValueError("more than 20 aliases; write the values out")
            content = yaml.safe_load(text)
        except OSError as error:
            raise UserError(f"--config {name} can't be read ({error.strerror}).") from error
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{name} is not a plain YAML file in UTF-8 ({error}).") from error
        for section in ("model", "data", "trainer"):
            if isinstance(content, dict) and not isinstance(content.get(section, {}), dict | str):
                raise UserError(f"{name}: {section} must contain options, got {content[section]}.")
    return args
