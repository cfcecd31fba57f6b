"""The keys of the `handler:` section as options of a command, made from the fields of config.py.

A key has one default, one text and one set of limits, in whichever way it is given; `parse_config` judges both. Of its
own an option has a short form, and what only a command can do: to fetch what is named by its id on the hub.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from ts_parallel.cli.options import CONFIG_HELP, config_path, locate_adapter, parse_split_points
from ts_parallel.config import HandlerConfig, parse_bytes
from ts_parallel.errors import ConfigError

HandlerKeys = Mapping[str, Any]
"""Those keys of the `handler:` section that options gave, and what `parse_config` is to be told of each."""

_FLAGS = {"adapter_path": "--adapter", "config_path": "--config"}
_SHORT_FLAGS = {"tensor_parallel_size": "-tp", "pipeline_parallel_size": "-pp"}
_HELP = {
    "adapter_path": "Folder of a LoRA adapter to merge into the weights, or the id of one on the hub.",
    "config_path": CONFIG_HELP,
}
_METAVARS = {"served_model_name": "NAME,…"}
_READERS: dict[str, Callable[[str], Any]] = {
    "split_points": parse_split_points,
    "adapter_path": locate_adapter,
    "config_path": lambda folder: config_path(Path(folder)),
}
_FIELDS = {key: field for key, field in HandlerConfig.model_fields.items() if key != "model_path"}  # an argument
_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def takes_handler_keys(*keys: str, **defaults: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options in place of its parameter `keys`, which is then told a `HandlerKeys`.

    Args:
        keys: that it has options for; none: all of them.
        defaults: of the command, where they are others than the key's.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = keys or tuple(_FIELDS)

        @wraps(command)
        def run(*arguments: Any, **options: Any) -> None:
            given = {key: options.pop(key, None) for key in own}
            values = {**defaults, **{key: value for key, value in given.items() if value is not None}}
            try:
                command(*arguments, keys={key: _read(key, value) for key, value in values.items()}, **options)
            except ConfigError as error:
                raise ConfigError(_name_option(str(error))) from None

        parameters = _parameters(command, {key: _annotation(key, defaults.get(key)) for key in own})
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameters(command: Callable[..., None], made: Mapping[str, Any]) -> list[inspect.Parameter]:
    """Those of the command, with one of each annotation that was made in place of `keys`."""
    known = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name != "keys":
            parameters.append(parameter.replace(annotation=known[parameter.name]))
            continue
        for key, annotation in made.items():
            parameters.append(inspect.Parameter(key, parameter.kind, default=None, annotation=annotation))
    return parameters


def _flag_of(key: str) -> str:
    """`max_num_seqs` → `--max-num-seqs`."""
    return _FLAGS.get(key, "--" + key.replace("_", "-"))


def _name_option(message: str) -> str:
    """A refusal of `parse_config`, as whoever wrote an option reads it."""
    return re.sub(r"^handler key '(\w+)[^']*'", lambda match: _flag_of(match[1]), message)


def _annotation(key: str, default: str | None) -> Any:
    """What typer makes an option of. It is told no type but text: `parse_config` refuses what is wrong, in one line."""
    field, flag = _FIELDS[key], _flag_of(key)
    default = default or _shown(field)
    text = _HELP.get(key, " ".join((field.description or "").split())) + (f" [default: {default}]" if default else "")
    if field.annotation is bool:
        flags = f"{flag}/--no{flag[1:]}" if field.default else flag
        return Annotated[bool | None, typer.Option(flags, help=text, show_default=False)]
    choices = _choices(field)
    flags_of_key = [flag, *([_SHORT_FLAGS[key]] if key in _SHORT_FLAGS else [])]

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    option = typer.Option(
        *flags_of_key,
        help=text,
        metavar="|".join(choices) or _metavar(key, field),
        show_default=False,
        autocompletion=complete if choices else None,
    )
    return Annotated[str | None, option]


def _metavar(key: str, field: FieldInfo) -> str:
    if _is_bytes(field):
        return "BYTES"
    if key in _METAVARS:
        return _METAVARS[key]
    names = {int: "N", float: "X", str: "DIR", tuple: "LAYER,…"}
    return names[_kinds(field.annotation)[0]]


def _read(key: str, value: Any) -> Any:
    """What YAML would have made of the same text."""
    if key in _READERS:
        return _READERS[key](value)
    if isinstance(value, str) and {int, float} & set(_kinds(_FIELDS[key].annotation)):
        return _number(value)
    return value


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _shown(field: FieldInfo) -> str:
    """The default; nothing where that is said in the field's own text."""
    if field.default is None or field.default is False:
        return ""
    if field.default is True:
        return "on"
    if _is_bytes(field):
        unit = next((unit for unit, size in _UNITS.items() if field.default % size == 0), "")
        return f"{field.default // _UNITS.get(unit, 1)}{unit}"
    return str(field.default)


def _is_bytes(field: FieldInfo) -> bool:
    return any(getattr(each, "func", None) is parse_bytes for each in field.metadata)


def _choices(field: FieldInfo) -> list[str]:
    return [kind for kind in _kinds(field.annotation) if isinstance(kind, str)]


def _kinds(annotation: Any) -> list[Any]:
    """`Literal["a", "b"] | None` → `["a", "b"]`, `Count` → `[int]`."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is tuple or not inside:
        return [] if annotation in (None, NoneType) else [origin or annotation]
    return list(dict.fromkeys(kind for each in inside[: 1 if origin is Annotated else None] for kind in _kinds(each)))
