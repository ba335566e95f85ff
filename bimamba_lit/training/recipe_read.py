"""Reading recipes and command lines into nested settings, before jsonargparse parses them.

``${…}`` in a recipe is resolved when the file is read: jsonargparse's own way fails where the command line sets
something beside it.
"""

import typing
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bimamba_lit.errors import UserError, nearest
from bimamba_lit.recipe_folder import list_recipes
from bimamba_lit.training.yaml_depth import check_depth

Settings = dict[str, Any]


def read_settings(args: Sequence[str]) -> Settings:
    """Return the nested settings of a command line: those of its recipes, in order, under those it sets itself.

    Args:
        args: The arguments after the command: ``-c FILE``, ``--key value``, ``--key=value``, ``--key+=value``.

    Raises:
        UserError: If a recipe is missing or cannot be read.
    """
    settings: Settings = {}
    for name, value in _options(args):
        if name in ("-c", "--config"):
            _merge(settings, read_recipe(Path(value)))
        elif name.startswith("--"):
            key = name.removeprefix("--").rstrip("+")
            _set(settings, key.split("."), _scalar(value, key), append=name.endswith("+"))
    return settings


def with_resolved_recipes(args: Sequence[str]) -> list[str]:
    """Return a command line with each recipe's path replaced by its resolved content: jsonargparse takes both.

    Raises:
        UserError: If a recipe is missing or cannot be read.
    """
    resolved: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if name in ("-c", "--config"):
            path = value if equals else (rest.pop(0) if rest else "")
            resolved += ["--config", yaml.safe_dump(read_recipe(Path(path)), sort_keys=False)]
        else:
            resolved.append(arg)
    return resolved


def read_recipe(path: Path) -> Settings:
    """Return the settings of one recipe, its ``${…}`` resolved.

    Raises:
        UserError: If it is missing, not UTF-8, not YAML, or an interpolation has nothing to stand for.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a recipe is a file: give {path / 'NAME.yaml'}")
    if not path.is_file():
        raise UserError(f"there is no recipe {path}{_hint(path)}")
    try:
        text = path.read_text(encoding="utf-8")
        check_depth(text)
        recipe = OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path} is broken YAML{where}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # a date of month 13, a number of 5000 digits, no UTF-8
        raise UserError(f"{path} is not a YAML text file: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be a recipe") from error
    except OSError as error:  # also what omegaconf says of a number or a date where a mapping should be
        raise UserError(f"{path} cannot be read as a recipe: {error.strerror or error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is not a recipe: it must map keys such as trainer, model and data to their settings")
    return typing.cast(Settings, recipe)


def _hint(missing: Path) -> str:
    siblings = [entry.name for entry in missing.parent.iterdir()] if missing.parent.is_dir() else []
    if near := nearest(missing.name, siblings):
        return near
    for name in list_recipes():
        if missing.name in (name, name.removesuffix(".yaml")):
            return f"; one comes with the package: `bimamba recipes cp {name} {missing.parent}` copies it there"
    return "; `bimamba recipes` lists those that come with the package"


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(args)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name.startswith("-"):
            yield name, value if equals else (rest.pop(0) if rest else "")


def _scalar(text: str, key: str) -> Any:
    try:
        check_depth(text)
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=True)["value"]  # type: ignore[call-overload, index]
    except (yaml.YAMLError, OmegaConfBaseException):
        return text
    except RecursionError as error:
        raise UserError(f"{key}: the value is nested too deeply to be a setting") from error


def _merge(settings: Settings, more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(settings.get(key), dict):
            _merge(settings[key], value)
        else:
            settings[key] = value


def _set(settings: Settings, path: list[str], value: Any, append: bool) -> None:
    *outer, key = path
    for name in outer:
        if name != "init_args":  # arguments stand beside the class's name as well as below init_args
            settings = _opened(settings, name)
    present = settings.get(key)
    if append:
        present = [] if present is None else present
        value = [*(present if isinstance(present, list) else [present]), value]
    elif isinstance(value, str) and isinstance(present, dict) and "class_path" in present and _names_class(value):
        value = {"class_path": value}
    settings[key] = value


def _names_class(value: str) -> bool:
    """Tell a class's name from a word that stands for one, such as ddp for ``trainer.strategy``."""
    return "." in value or not value.islower()


def _opened(settings: Settings, key: str) -> Settings:
    """Return the settings below ``key``, of a list those of its last item, with a class's arguments beside its name."""
    items = settings.get(key)
    inner = items[-1] if isinstance(items, list) and items else items
    if isinstance(inner, str):
        inner = {"class_path": inner}
    if not isinstance(inner, dict):
        inner = {}
    inner |= inner.pop("init_args", None) or {}
    if isinstance(items, list) and items:
        items[-1] = inner
    else:
        settings[key] = inner
    return inner
