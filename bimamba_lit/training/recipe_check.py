"""Checking a recipe and the command line against the classes they name, before they are parsed.

jsonargparse tries every alternative of a setting's type and reports all that failed: a misspelt key three levels deep
comes out as a page of alternatives. Here the settings are walked beside the signatures of the classes they configure,
so that the one wrong key or value can be named with its full path and what would be right.
"""

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Optional, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from bimamba_lit.errors import UserError, nearest

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def check_settings(settings: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
    """Check every key and value of ``settings``, at any depth.

    Args:
        settings: What :func:`bimamba_lit.training.recipe_read.read_settings` returned.
        groups: The type of each top-level key: a class with plain arguments (``trainer``), or a base class of which a
            subclass is named (``type[Base]``: ``model``, ``data``), or the type of a value.

    Raises:
        UserError: If a key is unknown (the nearest right one is named), a value is of the wrong type, or a class cannot
            be found or is not of the kind that is wanted.
    """
    for key in settings:
        if key not in groups and (group := _group_with(key, settings, groups)) is not None:
            raise UserError(f"there is no key '{key}'; did you mean '{group}.{key}'?")
    _check_keys("", settings, groups)
    for key, value in settings.items():
        kind = groups[key]
        if get_origin(kind) is type:
            _check_class(key, value, get_args(kind))
        elif inspect.isclass(kind) and isinstance(value, Mapping):
            _check_arguments(key, value, kind)
        else:
            _check_value(key, value, kind)


def _group_with(key: str, settings: Mapping[str, Any], groups: Mapping[str, Any]) -> str | None:
    """Return the group of which a key that stands beside the groups is a setting; None if there is none."""
    for group, kind in groups.items():
        if get_origin(kind) is type:
            value = settings.get(group)
            name = value.get("class_path") if isinstance(value, Mapping) else value
            if name is None:
                continue
            kind = _find_class(f"{group}.class_path", str(name), get_args(kind))
        if inspect.isclass(kind) and key in (_parameters(kind) or ()):
            return group
    return None


def _check_value(path: str, value: Any, kind: Any) -> None:
    """Check a value against the type of its parameter, descending into lists and classes."""
    kinds = list(_alternatives(kind))
    if isinstance(value, list):
        elements = [get_args(one)[0] for one in kinds if _is_sequence(one)]
        if elements:
            for index, item in enumerate(value):
                _check_value(f"{path}[{index}]", item, Union[tuple(elements)])  # noqa: UP007
            return
    bases = tuple(base for base in map(_class_wanted, kinds) if base is not None)
    if isinstance(value, Mapping):
        _check_mapping_keys(path, value, kinds)
    if isinstance(value, Mapping) and "class_path" not in value:
        dataclass = next((base for base in bases if dataclasses.is_dataclass(base)), None)
        if dataclass is not None:
            _check_arguments(path, value, dataclass)
            return
    simple = [one for one in kinds if _class_wanted(one) is None]
    shown = "null" if value is None else repr(value)
    if bases and (isinstance(value, Mapping) or (isinstance(value, str) and not _fits(value, simple))):
        _check_class(path, value, bases, given=max(map(_given, kinds)))
    elif not bases and not _fits(value, kinds):
        raise UserError(f"{path}: {shown} is not right, it must be {_told(kinds)}{_without_space(value)}")
    elif bases and not isinstance(value, str | Mapping) and not _fits(value, simple):
        raise UserError(f"{path}: {shown} is not right, it must be {_told(kinds)}")


def _check_mapping_keys(path: str, value: Mapping[Any, Any], kinds: list[Any]) -> None:
    """Raise for a key that YAML read as a number, as it does with {1: 0.5}, where keys are names."""
    named = any(get_origin(kind) is dict and get_args(kind)[0] is str for kind in kinds)
    wrong = [key for key in value if named and not isinstance(key, str)]
    if wrong:
        shown = "null" if wrong[0] is None else repr(wrong[0])
        raise UserError(f"{path}: the key {shown} is not right, it must be text")


def _without_space(value: Any) -> str:
    """Return what to do about what YAML read as keys without values, as {in_proj:0.5}, or as text, as {in_proj:[1]}."""
    keys: list[Any] = []
    if isinstance(value, Mapping):
        keys = [key for key, item in value.items() if item is None and ":" in str(key)]
    elif isinstance(value, str) and value.startswith("{"):
        keys = re.findall(r"[^\s{}\[\],:]+:(?=\S)", value)
    return f"; YAML wants a space after the colon of {keys[0]}" if keys else ""


def _check_class(path: str, value: Any, bases: tuple[type, ...], given: int = 0) -> None:
    """Check ``class_path`` and ``init_args``, or the short forms of them: a name alone, arguments beside the name.

    The first ``given`` arguments are no settings: the program gives them when it calls the class.
    """
    if isinstance(value, str):
        value = {"class_path": value}
    wanted = " or ".join(base.__name__ for base in bases)
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: {value!r} is not right, it must name a {wanted} by its class_path")
    name = value.get("class_path")
    if name is None:
        raise UserError(f"{path} has no class_path: it must name a {wanted}")
    cls = _find_class(f"{path}.class_path", str(name), bases)
    arguments = {key: item for key, item in value.items() if key not in CLASS_KEYS}
    if isinstance(value.get("init_args"), Mapping):
        arguments |= value["init_args"]
        path = f"{path}.init_args"
    _check_arguments(path, arguments, cls, given)


def _check_arguments(path: str, arguments: Mapping[str, Any], cls: type, given: int = 0) -> None:
    parameters = _parameters(cls)
    if parameters is None:
        return
    required = _required(cls)
    of_the_program = required[:given]
    _check_keys(path, arguments, {key: kind for key, kind in parameters.items() if key not in of_the_program}, cls)
    for key in required[given:]:
        if key not in arguments:
            raise UserError(f"{path} has no '{key}', which {cls.__name__} needs")
    for key, value in arguments.items():
        _check_value(f"{path}.{key}", value, parameters[key])


def _check_keys(path: str, settings: Mapping[str, Any], known: Mapping[str, Any], cls: type | None = None) -> None:
    for key in settings:
        if key not in known:
            place = f"{path} has no key '{key}'" if path else f"there is no key '{key}'"
            those = f"it has {', '.join(known)}" if known or cls is None else f"{cls.__name__} takes none"
            raise UserError(f"{place}{nearest(str(key), known) or f'; {those}'}")


def _find_class(path: str, name: str, bases: tuple[type, ...]) -> type:
    wanted = " or ".join(base.__name__ for base in bases)
    known = {cls.__name__: cls for base in bases for cls in _subclasses(base)}
    if "." not in name:
        if name not in known:
            ours = sorted(key for key, cls in known.items() if _is_ours(cls))
            hint = nearest(name, ours) or f"; known are {', '.join(ours)}, others by full path (my_module.MyClass)"
            raise UserError(f"{path}: there is no {wanted} '{name}'{hint}")
        return known[name]
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two of "." and ".name"
        if isinstance(error, ImportError) and not f"{module}.".startswith(f"{error.name}."):  # it is there, and fails
            raise UserError(f"{path}: '{name}' cannot be imported: {error}") from error
        root = module.split(".")[0]
        places = [f"{module}.{key}" for key, cls in known.items() if root and cls.__module__.startswith(root)]
        raise UserError(f"{path}: there is no class '{name}'{nearest(name, places)}") from error
    if not (inspect.isclass(found) and issubclass(found, bases)):
        raise UserError(f"{path}: '{name}' is no {wanted}: name a subclass of it")
    return found


def _parameters(cls: type) -> dict[str, Any] | None:
    """Return the arguments of a class by name with their types, through ``**kwargs``; ``None`` if it takes any."""
    found: dict[str, Any] = {}
    inits = [vars(owner)["__init__"] for owner in cls.__mro__[:-1] if "__init__" in vars(owner)]  # object is the last
    for init in inits:
        try:
            hints = typing.get_type_hints(inspect.unwrap(init))
        except NameError:  # a name that is only imported for type checkers
            hints = {}
        signature = inspect.signature(init)
        for parameter in list(signature.parameters.values())[1:]:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                kind = hints.get(parameter.name, Any)
                found.setdefault(parameter.name, Optional[kind] if parameter.default is None else kind)  # noqa: UP045
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            return found
    return None if inits else {}


def _required(cls: type) -> list[str]:
    """Return the arguments of a class that have no default, in order."""
    parameters = inspect.signature(cls).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.default is one.empty and one.kind in positional]


def _alternatives(kind: Any) -> Iterator[Any]:
    if get_origin(kind) in (Union, types.UnionType):
        for one in get_args(kind):
            yield from _alternatives(one)
    else:
        yield kind


def _class_wanted(kind: Any) -> type | None:
    """Return the class that a setting names by ``class_path``, or a dataclass; ``None`` for plain values."""
    if _is_callable(kind):
        kind = get_args(kind)[1]
    if inspect.isclass(kind) and get_origin(kind) is None and kind.__module__ not in _PLAIN_MODULES:
        return kind
    return None


def _is_callable(kind: Any) -> bool:
    return get_origin(kind) is Callable and bool(get_args(kind))


def _given(kind: Any) -> int:
    """Return how many arguments a class wanted as ``Callable[[…], Base]`` is called with."""
    arguments = get_args(kind)[0] if _is_callable(kind) else []
    return len(arguments) if isinstance(arguments, list) else 0


_PLAIN_MODULES = ("builtins", "pathlib", "datetime", "types")


def _is_sequence(kind: Any) -> bool:
    origin = get_origin(kind)
    if not inspect.isclass(origin) or origin is dict:
        return False
    return issubclass(origin, Iterable) and bool(get_args(kind))


def _fits(value: Any, kinds: list[Any]) -> bool:
    if not kinds:
        return False
    if value is None:  # which jsonargparse takes for a setting that is not there
        return Any in kinds or type(None) in kinds
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=Union[tuple(kinds)] if Any not in kinds else Any)  # noqa: UP007
    try:
        parser.parse_object({"value": value})
    except ArgumentError:
        return False
    return True


def _told(kinds: list[Any]) -> str:
    words: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words += [repr(value) for value in get_args(kind)]
        elif kind is type(None):
            words.append("null")
        elif inspect.isclass(kind) and get_origin(kind) is None:
            words.append(_WORDS.get(kind, f"a {kind.__name__}"))
        else:
            words.append(f"a {str(kind).replace('typing.', '')}")
    return " or ".join(dict.fromkeys(words))


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("bimamba_lit") and not inspect.isabstract(cls)


def _subclasses(base: type) -> Iterator[type]:
    yield base
    children: list[type] = base.__subclasses__()
    for child in children:
        yield from _subclasses(child)
