"""Configurations are frozen dataclasses: their fields are the command line, the saved file and the defaults.

Each part owns its own (`models.config.ModelConfig`, `training.config.TrainConfig`, …); this file holds what
they share: strict conversion from and to plain dictionaries, TOML recipes and JSON.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from convlstm_vo.errors import ConvlstmVoError

Config = TypeVar("Config")


class ConfigError(ConvlstmVoError):
    """An unknown key or a value of the wrong kind in a configuration."""


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def update(config: Config, changes: dict[str, Any], source: str, prefix: str = "") -> Config:
    """A copy of ``config`` with some of its fields changed, as a recipe or a saved file names them.

    Args:
        config: a dataclass instance; nested dataclasses take nested dictionaries.
        changes: new values by field name.
        source: the file that they come from, for messages.
        prefix: the dotted path of ``config`` within it.

    Raises:
        ConfigError: an unknown key (the nearest known one is named) or a value of another type.
    """
    hints = typing.get_type_hints(type(config))
    for key in changes:
        if key not in hints:
            raise ConfigError(f"{source}: unknown key '{prefix}{key}'; {_nearest(key, hints)}")
    values = {
        key: _convert(value, hints[key], getattr(config, key), source, prefix + key)
        for key, value in changes.items()
    }
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def _nearest(key: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"


def _convert(value: Any, hint: Any, current: Any, source: str, key: str) -> Any:
    """``value`` as the annotated type; JSON and TOML have no tuples, paths or nested dataclasses."""
    if dataclasses.is_dataclass(current) and isinstance(value, dict):
        return update(current, value, source, f"{key}.")
    for option in _options(hint):
        converted = _as(option, value)
        if converted is not None or (value is None and option is type(None)):
            return converted
    raise ConfigError(f"{source}: '{key}' is {value!r}, but must be {_describe(hint)}")


def _options(hint: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _options(typing.get_args(hint)[0])
    return typing.get_args(hint) if origin in (typing.Union, types.UnionType) else (hint,)


def _as(hint: Any, value: Any) -> Any:
    """``value`` as ``hint``, or None where it does not fit."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value if value in typing.get_args(hint) else None
    if origin is tuple:
        return _as_tuple(typing.get_args(hint), value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    plain = isinstance(hint, type) and isinstance(value, hint)
    return value if plain and (hint is bool or not isinstance(value, bool)) else None


def _as_tuple(item_hints: tuple[Any, ...], value: Any) -> tuple[Any, ...] | None:
    if not isinstance(value, (list, tuple)):
        return None
    repeated = len(item_hints) == 2 and item_hints[1] is Ellipsis
    hints = [item_hints[0]] * len(value) if repeated else list(item_hints)
    items = [_as(hint, item) for hint, item in zip(hints, value, strict=False)]
    return tuple(items) if len(hints) == len(value) and None not in items else None


def _describe(hint: Any) -> str:
    names = []
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            names.append("one of " + ", ".join(repr(choice) for choice in typing.get_args(option)))
        else:
            names.append(getattr(option, "__name__", str(option)) if not typing.get_args(option) else str(option))
    return " or ".join(names)


def read_toml(path: Path) -> dict[str, Any]:
    """A recipe: differences from the defaults, as TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A saved configuration."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a {type(data).__name__}, but must hold an object of keys and values")
    return data
