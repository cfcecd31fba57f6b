"""A description of routes, made of what checks their bodies. Knows no route of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

JSON, EVENTS, TEXT, FORM = "application/json", "text/event-stream", "text/plain", "multipart/form-data"
ROUTE = "openapi.json"

_REFERENCE = "#/components/schemas/{model}"
_NAMES = re.compile(r"\{(\w+)\}")
_NOT_OURS = "What stands before the routes answers for itself, in shapes of its own: a front end, a proxy."

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Operation:
    """What one method does on one path."""

    path: str
    """Begins with a slash; `{name}` in it is any text."""
    says: str
    """One line."""
    method: str = "get"
    bodies: tuple[type[BaseModel] | Schema, ...] = ()
    """One of which the body is; none: there is no body."""
    takes: tuple[str, ...] = (JSON,)
    """Types of a body."""
    answers: tuple[str, ...] = (JSON,)
    """Types of an answer that is no refusal."""
    needs_key: bool = True


@dataclass(frozen=True)
class Description:
    """All operations of a server."""

    title: str
    operations: Iterable[Operation]
    error: Schema
    """Of each refusal's body."""
    takes_others: bool = True
    """Whether a body may have fields that are not told of here."""
    has_keys: bool = False
    others: Mapping[str, Any] = field(default_factory=dict)
    """What else the document has."""

    def document(self) -> dict[str, Any]:
        operations = list(self.operations)
        models = {own: None for each in operations for own in each.bodies if isinstance(own, type)}
        _, defined = models_json_schema([(own, "validation") for own in models], ref_template=_REFERENCE)
        schemas = dict(defined.get("$defs", {}))
        if self.takes_others:
            for own in models:
                schemas[own.__name__].pop("additionalProperties", None)
        paths: dict[str, Any] = {}
        for each in operations:
            paths.setdefault(each.path, {})[each.method] = self._operation(each)
        components: dict[str, Any] = {"schemas": {**schemas, "Error": dict(self.error)}}
        if self.has_keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        info = {"title": self.title, "version": _own_version(), "description": _NOT_OURS}
        return {"openapi": "3.1.0", "info": info, **self.others, "paths": paths, "components": components}

    def _operation(self, own: Operation) -> dict[str, Any]:
        made: dict[str, Any] = {"summary": own.says}
        if names := _NAMES.findall(own.path):
            made["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        if own.bodies:
            text = {"schema": {"type": "string"}}
            content = {kind: text if kind == TEXT else _one_of(own.bodies) for kind in own.takes}
            made["requestBody"] = {"required": True, "content": content}
        refused = {"description": "A refusal.", "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
        answered = {"description": "The answer.", "content": {kind: {} for kind in own.answers}}
        made["responses"] = {"200": answered, "4XX": refused, "5XX": refused}
        if self.has_keys and own.needs_key:
            made["security"] = [{"key": []}]
        return made


def object_of(fields: Mapping[str, Schema] | Iterable[str], required: Iterable[str] = ()) -> dict[str, Any]:
    """The schema of an object, of its fields' schemas, or of their names where anything may be their value."""
    properties = dict(fields) if isinstance(fields, Mapping) else {name: {} for name in fields}
    wanted = list(required)
    return {"type": "object", "properties": properties, **({"required": wanted} if wanted else {})}


def _one_of(bodies: tuple[type[BaseModel] | Schema, ...]) -> dict[str, Any]:
    schemas = [{"$ref": _REFERENCE.format(model=own.__name__)} if isinstance(own, type) else own for own in bodies]
    return {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}


def _own_version() -> str:
    try:
        return version("ts-parallel")
    except PackageNotFoundError:
        return "unknown"
