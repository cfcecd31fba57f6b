"""A JSON object → a body whose fields are of the right types, or one `RequestError` that names the field at fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from ts_parallel.errors import RequestError
from ts_parallel.serving.exchange import echo
from ts_parallel.serving.text.forms import StrictModel

MOST_LEVELS = 200  # of objects and lists in one another: what reads them is recursive, ours and others'
_PLAIN = {int, float, bool, type(None)}  # what neither is text nor holds any

B = TypeVar("B", bound=StrictModel)


def validated(body: type[B], fields: Mapping[str, Any]) -> B:
    """
    Raises:
        RequestError: a field is missing or wrong; it says which, and what was wanted.
    """
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
            if not set(map(type, inner)) <= _PLAIN:  # most are long lists of token ids
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
        if inner and {float, list} & set(map(type, value)):
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
