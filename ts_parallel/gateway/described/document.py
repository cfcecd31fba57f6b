"""`GET /openapi.json`: the gateway's routes, and of those that pass as they are what the models say of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ts_parallel.errors import RequestError
from ts_parallel.gateway.passing import headers_to_pass
from ts_parallel.gateway.refusals import ERRORS, json_answer
from ts_parallel.gateway.upstream.models import Upstream, Upstreams
from ts_parallel.openapi import document as openapi
from ts_parallel.openapi.document import Description, Operation


class Document:
    """Owns the table of the gateway's operations. The models are lent."""

    def __init__(self, upstreams: Upstreams, has_keys: bool) -> None:
        self._upstreams = upstreams
        self._has_keys = has_keys
        self._operations: list[Operation] = []
        self._passed: frozenset[str] = frozenset()

    def tell_of(self, operations: Sequence[Operation], passed: Sequence[str]) -> None:
        """
        Args:
            passed: paths whose bodies are the models' own.
        """
        self._operations, self._passed = list(operations), frozenset(passed)

    async def show(self, request: Request) -> Response:
        """This description."""
        told = await asyncio.gather(*(_told(own, headers_to_pass(request)) for own in self._upstreams.all))
        operations = [self._with_body(own, told) for own in self._operations]
        made = Description("ts_parallel's gateway", operations, ERRORS, has_keys=self._has_keys).document()
        for document in reversed(told):  # what several say, the first says
            made["components"]["schemas"] = document["components"]["schemas"] | made["components"]["schemas"]
        return json_answer(made)

    def _with_body(self, own: Operation, told: Sequence[Mapping[str, Any]]) -> Operation:
        """A passed one takes what any of the models takes."""
        if own.path not in self._passed:
            return own
        contents = [
            document["paths"][own.path][own.method]["requestBody"]["content"]
            for document in told
            if own.path in document["paths"]
        ]
        if not contents:
            return own
        schemas = [content[kind]["schema"] for content in contents for kind in own.takes if kind in content]
        distinct = [schema for at, schema in enumerate(schemas) if schema not in schemas[:at]]
        return replace(own, bodies=tuple(distinct) or own.bodies)


async def _told(upstream: Upstream, headers: Mapping[str, str]) -> Mapping[str, Any]:
    """What a model says of its routes; nothing where it does not answer, or is none of ours."""
    nothing: dict[str, Any] = {"paths": {}, "components": {"schemas": {}}}
    try:
        async with upstream.asked("GET", openapi.ROUTE, b"", headers) as exchange:
            text = await exchange.read_all()
        found = json.loads(text) if exchange.status == 200 else nothing
        return {"paths": found["paths"], "components": {"schemas": found["components"]["schemas"]}}
    except (RequestError, ValueError, LookupError, TypeError):
        return nothing
