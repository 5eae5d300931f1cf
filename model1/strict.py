"""Strict building of frozen config dataclasses from plain data: every key known, typed, present."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

from model1.errors import ConfigError

_T = typing.TypeVar("_T")


def require(ok: bool, message: str) -> None:
    """Raise ConfigError with `message` unless ok."""
    if not ok:
        raise ConfigError(message)


def positive(part: object, *names: str) -> None:
    """Raise ConfigError unless every named field of `part` is above 0."""
    for name in names:
        value = getattr(part, name)
        require(value > 0, f"{name} must be positive, got {value}")


def not_negative(part: object, *names: str) -> None:
    """Raise ConfigError unless every named field of `part` is at least 0."""
    for name in names:
        value = getattr(part, name)
        require(value >= 0, f"{name} must not be negative, got {value}")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ConfigError if it cannot be read or holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"config {path} is not valid JSON: {error}") from error
    require(isinstance(data, dict), f"config {path} must hold a JSON object")
    return data


def build_dataclass(cls: type[_T], data: dict[str, Any], *, where: str = "") -> _T:
    """Build a config dataclass from plain data, rejecting unknown, missing and mistyped keys."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    require(not unknown, f"unknown config key {where}{unknown[0]}" if unknown else "")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], where + name)
        else:
            has_default = (
                field.default is not dataclasses.MISSING
                or field.default_factory is not dataclasses.MISSING
            )
            require(has_default, f"missing config key {where}{name}")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, dict), f"{where} must be an object, got {value!r}")
        return build_dataclass(hint, value, where=where + ".")  # type: ignore[arg-type]
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where} must be a list, got {value!r}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        require(value in args, f"{where} must be one of {list(args)}, got {value!r}")
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        require(math.isfinite(value), f"{where} must be finite, got {value!r}")
        return float(value)
    good = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(good, f"{where} must be {hint.__name__}, got {value!r}")
    return value
