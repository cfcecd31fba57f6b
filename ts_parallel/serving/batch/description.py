"""`GET openapi.json`: the routes of a model of batch inference, described by the tables that check their fields."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ts_parallel.openapi import document as openapi
from ts_parallel.openapi.document import FORM, JSON, TEXT, Operation, object_of
from ts_parallel.serving.batch.tasks import Task
from ts_parallel.serving.exchange import ERROR, HERE

ALWAYS = ("v1/models", "health", openapi.ROUTE)
"""Routes of every model."""
_FILES = ("file", "image")  # fields that come in forms too


def description(name: str, task: Task) -> str:
    told = openapi.Description(f"The model {name}", _operations(task), ERROR, others=HERE)
    return json.dumps(told.document())


def _operations(task: Task) -> Iterator[Operation]:
    yield Operation("/health", "Whether the model answers.", needs_key=False)
    yield Operation("/v1/models", "The model, and which task it is for.")
    yield Operation(f"/{openapi.ROUTE}", "This description.")
    for route, fields in {"": task.fields, **task.routes}.items():
        takes_files = any(name in fields for name in _FILES)
        kinds = (JSON, *((FORM, "application/octet-stream") if takes_files else ()), *(() if route else (TEXT,)))
        says = "Answer by this route's API." if route else "Answer one item, or what the other routes take."
        yield Operation(f"/{route}", says, "post", (object_of(fields),), kinds)
