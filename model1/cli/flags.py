"""Command-line flags made from the fields of config dataclasses, so that the two cannot drift."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, TypeVar

import typer

from model1.errors import ConfigError, RequestError

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """What a flag needs besides the field's name, type and default."""

    help: str
    envvar: str | None = None


def with_flags(*groups: tuple[type, Mapping[str, Flag]]) -> Callable[[F], F]:
    """Replace a command's `**values` by one option per listed field: max_model_len ->
    --max-model-len, with the field's type and default.
    """

    def decorate(command: F) -> F:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        parameters = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
        for config, flags in groups:
            hints = typing.get_type_hints(config)
            by_name = {field.name: field for field in fields(config)}
            parameters += [_parameter(by_name[n], hints[n], flag) for n, flag in flags.items()]
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameter(field: Field[Any], hint: Any, flag: Flag) -> inspect.Parameter:
    if field.default is MISSING:
        raise AssertionError(f"flag field {field.name} has no default")
    name = "--" + field.name.replace("_", "-")
    option = typer.Option(name, help=flag.help, envvar=flag.envvar, show_envvar=True)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=Annotated[hint, option],
    )


def from_flags(
    config: type[C], flags: Iterable[str], values: Mapping[str, Any], **others: Any
) -> C:
    """The config that the flags spell. A value it refuses is a usage error: exit code 2."""
    try:
        return config(**{name: values[name] for name in flags}, **others)
    except (ConfigError, RequestError) as error:
        raise typer.BadParameter(str(error)) from error
