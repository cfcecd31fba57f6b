"""A JSON object → a body whose fields are of the right types, or one `RequestError` that names the field at fault."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError, ValidatorFunctionWrapHandler

from ts_parallel.errors import RequestError
from ts_parallel.serving.exchange import echo
from ts_parallel.serving.text.forms import StrictModel

MOST_LEVELS = 200  # of objects and lists in one another: what reads them is recursive, ours and others'
MOST_FIELDS = 1000  # of a body, known or not
_PLAIN = {int, float, bool, type(None)}  # what neither is text nor holds any
_ITEMS_AT_ONCE = 10_000  # of a list: between two parts other threads go on

B = TypeVar("B", bound=StrictModel)


def validated(body: type[B], fields: Mapping[str, Any]) -> B:
    """
    Raises:
        RequestError: a field is missing or wrong; it says which, and what was wanted.
    """
    refuse_many(fields, "the body")
    for name, value in fields.items():
        refuse_unreadable(value, name)
    known = body.model_fields
    fields = {
        name: _whole(value, _kinds(known[name].annotation)) if name in known else value
        for name, value in fields.items()
        if value is not None or name not in known or known[name].is_required()
    }
    try:
        return body(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        is_missing = first["type"] == "missing"
        place = _place(first["loc"], fields, is_missing)
        got = "" if is_missing else f", got {echo(first['input'])}"
        parameter = str(first["loc"][0]) if first["loc"] else None
        raise RequestError(f"{place}: {first['msg']}{got}", parameter, _code(first["type"])) from None


def refuse_many(fields: Mapping[str, Any], whose: str) -> None:
    """
    Raises:
        RequestError: an object of fields has more than any could mean something.
    """
    if len(fields) > MOST_FIELDS:
        raise RequestError(f"{whose} has {len(fields)} fields, at most {MOST_FIELDS} are read")


def in_parts(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """A long list as it is, where all its items are of types that `validate` takes: it would keep all other threads
    waiting."""
    if not isinstance(value, list) or _size(value) <= _ITEMS_AT_ONCE:
        return validate(value)
    try:
        validate(_one_of_each_type([value]))
    except ValidationError:
        return validate(value)  # for the error to say where
    return value


def of_numbers(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """An object's first value that is no number alone, where there is one: of a million errors only one is told."""
    if isinstance(value, dict) and len(value) > _ITEMS_AT_ONCE:
        for name, own in value.items():
            if type(own) not in (int, float) or not math.isfinite(own):
                return validate({name: own})
    return validate(value)


def _size(items: Sequence[Any]) -> int:
    return len(items) + sum(len(own) for own in items if isinstance(own, list))


def _one_of_each_type(lists: Sequence[list[Any]]) -> list[Any]:
    """An item of each type that lists have, and for all lists among them one that has as much."""
    found: dict[type, Any] = {}
    for items in lists:
        for part in _parts(items):
            for kind in set(map(type, part)) - found.keys():
                found[kind] = next(own for own in part if type(own) is kind)
    if list in found:
        found[list] = _one_of_each_type([own for items in lists for own in items if type(own) is list])
    return list(found.values())


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for at in range(0, len(items), _ITEMS_AT_ONCE):
        yield items[at : at + _ITEMS_AT_ONCE]


def types_of(items: Sequence[Any]) -> set[type]:
    if len(items) <= _ITEMS_AT_ONCE:
        return set(map(type, items))
    found: set[type] = set()
    for part in _parts(items):
        found.update(map(type, part))
    return found


def refuse_unreadable(value: Any, parameter: str) -> None:
    """
    Raises:
        RequestError: a text somewhere in a field's value is none, though JSON can write it, or lies too deep.
    """
    level = [value]
    for _ in range(MOST_LEVELS):
        texts = [own for own in level if isinstance(own, str)]
        if not all(map(_is_utf8, texts)):
            raise RequestError(f"{parameter}: half a surrogate pair, which is no character of any text", parameter)
        parts = [own for own in level if isinstance(own, (dict, list))]
        level = []
        for own in parts:
            inner = [*own, *own.values()] if isinstance(own, dict) else own
            if not types_of(inner) <= _PLAIN:  # most are long lists of token ids
                level += inner
        if not level:
            return
    raise RequestError(f"{parameter}: more than {MOST_LEVELS} levels of objects and lists", parameter)


def _whole(value: Any, kinds: Sequence[Any]) -> Any:
    """`16.0` where a whole number is wanted: many clients' languages have but one kind of number."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and int in kinds and float not in kinds else value
    if isinstance(value, list):
        inner = [own for kind in kinds if get_origin(kind) is list for own in _kinds(get_args(kind)[0])]
        if inner and {float, list} & types_of(value):
            return [_whole(own, inner) for own in value]
    return value


def _kinds(wanted: Any) -> list[Any]:
    """`int | list[int] | None` → `[int, list[int], NoneType]`."""
    if get_origin(wanted) is Annotated:
        return _kinds(get_args(wanted)[0])
    if get_origin(wanted) in (Union, UnionType):
        return [kind for own in get_args(wanted) for kind in _kinds(own)]
    return [wanted]


def _code(kind: str) -> str:
    """OpenAI's word for an error of pydantic's."""
    if kind == "missing":
        return "missing_required_parameter"
    return "invalid_type" if kind.endswith("_type") else "invalid_value"


def _place(loc: Sequence[str | int], fields: Mapping[str, Any], is_missing: bool) -> str:
    """The way to an error: keys and indices without pydantic's own names for the members of a union."""
    value: Any = fields
    way: list[str] = []
    for at, part in enumerate(loc):
        if isinstance(value, dict) and (part in value or (is_missing and at == len(loc) - 1)):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            continue
        way.append(str(part))
    return ".".join(way) or "body"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
