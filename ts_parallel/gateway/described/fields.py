"""Fields of a body and their types: one table that checks them, and that describes them in OpenAPI."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ts_parallel.errors import RequestError
from ts_parallel.openapi.document import Schema, object_of

Fields = Mapping[str, Schema]

TEXT: Schema = {"type": "string"}
TRUTH: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer"}
LIST: Schema = {"type": "array"}
OBJECT: Schema = {"type": "object"}
TEXT_OR_LIST: Schema = {"type": ["string", "array"]}
TEXT_OR_OBJECT: Schema = {"type": ["string", "object"]}
ANY: Schema = {}

_LONG = ("input", "inputs", "messages")  # which no answer repeats, and their readers look at
_KINDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "string": ("a text", (str,)),
    "boolean": ("true or false", (bool,)),
    "integer": ("a whole number", (int,)),
    "array": ("a list", (list,)),
    "object": ("an object", (dict,)),
}


def of_any_type(names: str) -> dict[str, Schema]:
    """Fields whose values are not looked at, their names between blanks."""
    return dict.fromkeys(names.split(), ANY)


def body_of(fields: Fields, *required: str) -> dict[str, Any]:
    """As OpenAPI describes it. What is null is as if it were not there."""
    return object_of({name: _or_null(schema) for name, schema in fields.items()}, required)


def check_types(body: Mapping[str, Any], fields: Fields) -> None:
    """
    Raises:
        RequestError: a field has a value of another type than it may, or a number that no JSON can have, which an
            answer could not repeat.
    """
    for name, value in body.items():
        if name not in _LONG and not _is_finite(value):
            raise RequestError(f"{name!r} has a number that is not finite, which JSON has not", name, "invalid_value")
        kinds = _kinds(fields.get(name, ANY))
        if kinds and value is not None and not any(_is(value, kind) for kind in kinds):
            wanted = " or ".join(_KINDS[kind][0] for kind in kinds)
            raise RequestError(f"{name!r} must be {wanted}, got {type(value).__name__}", name, "invalid_type")


def _is_finite(value: Any) -> bool:
    """Whether all numbers in it are, wherever they are."""
    left = [value]
    while left:
        own = left.pop()
        if isinstance(own, float) and not math.isfinite(own):
            return False
        if isinstance(own, (list, dict)):
            left += own.values() if isinstance(own, dict) else own
    return True


def _is(value: Any, kind: str) -> bool:
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # many clients' languages have but one kind of number
    return isinstance(value, _KINDS[kind][1]) and not (kind == "integer" and isinstance(value, bool))


def _kinds(schema: Schema) -> list[str]:
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else list(kind)


def _or_null(schema: Schema) -> Schema:
    return {**schema, "type": [*_kinds(schema), "null"]} if _kinds(schema) else schema
