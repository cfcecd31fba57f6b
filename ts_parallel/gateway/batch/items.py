"""A model of batch inference asked for several items at once: it takes one a request, and batches them itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ts_parallel.errors import RequestError
from ts_parallel.gateway.refusals import UpstreamError
from ts_parallel.gateway.upstream.models import Upstream

_MOST_AT_ONCE = 64
_MOST_ITEMS = 2048
_FIELD = "inputs"  # where clients have them


async def ask_each(upstream: Upstream, bodies: Sequence[Mapping[str, Any]], headers: Mapping[str, str]) -> list[Any]:
    """The answers to all items, in their order. The first refusal ends all.

    Raises:
        RequestError: one is refused, or there are too many.
    """
    if len(bodies) > _MOST_ITEMS:
        raise RequestError(f"{len(bodies)} items, at most {_MOST_ITEMS} are taken in one request", _FIELD)
    seats = asyncio.Semaphore(_MOST_AT_ONCE)

    async def ask(number: int) -> Any:
        async with seats:
            return await ask_one(upstream, json.dumps(bodies[number]).encode(), headers, f"{_FIELD}.{number}: ")

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(number)) for number in range(len(bodies))]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def ask_one(upstream: Upstream, body: bytes, headers: Mapping[str, str], place: str = "", route: str = "") -> Any:
    """One item's answer. `place` is where clients have it, for refusals to speak of.

    Raises:
        RequestError: it is refused, or answered by what is no JSON.
    """
    async with upstream.asked("POST", route, body, headers) as exchange:
        try:
            body = await upstream.whole(exchange)
        except RequestError as error:
            error.args = (f"{place}{error}",)
            raise
        try:
            return json.loads(body)
        except ValueError:
            raise UpstreamError(f"{place}the model's answer is no JSON") from None
