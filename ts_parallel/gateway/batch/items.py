"""A model of batch inference asked for several items at once: it takes one a request, and batches them itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ts_parallel.errors import NotFoundError, RequestError
from ts_parallel.gateway.refusals import UpstreamError
from ts_parallel.gateway.upstream.models import Upstream

_MOST_AT_ONCE = 64
MOST_ITEMS = 2048


async def ask_each(
    upstream: Upstream, bodies: Sequence[Mapping[str, Any]], headers: Mapping[str, str], field: str = "input"
) -> list[Any]:
    """The answers to all items, in their order. The first refusal ends all.

    Args:
        field: where clients have the items, for refusals to speak of.

    Raises:
        RequestError: one is refused, there are too many, or the model is one that generates text.
    """
    if len(bodies) > MOST_ITEMS:
        raise RequestError(f"{len(bodies)} items, at most {MOST_ITEMS} are taken in one request", field)
    await refuse_text_models(upstream)
    seats = asyncio.Semaphore(_MOST_AT_ONCE)

    async def ask(number: int) -> Any:
        async with seats:
            return await ask_one(upstream, json.dumps(bodies[number]).encode(), headers, f"{field}.{number}: ")

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
        if exchange.status >= 400:
            error = await upstream.refused(exchange)
            error.args = (f"{place}{error}",)
            raise error
        try:
            return json.loads(await exchange.read_all())
        except ValueError:
            raise UpstreamError(f"{place}the model's answer is no JSON") from None


async def refuse_text_models(upstream: Upstream) -> None:
    """
    Raises:
        NotFoundError: the model generates text, so it has no such answer.
    """
    if not upstream.is_ready:
        await upstream.look()
    if upstream.card is not None:
        raise NotFoundError(
            f"the model {upstream.name!r} generates text: this route is for models of batch inference", "model"
        )


def texts(value: Any, field: str) -> list[str]:
    """A text or a list of texts.

    Raises:
        RequestError: it is none, or an empty list.
    """
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found:
        raise RequestError(f"{field!r} must be a text or a list of texts, got {type(value).__name__}", field)
    for number, text in enumerate(found):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise RequestError(f"{field}.{number} must be a text, got {kind}: token ids are not taken here", field)
    return found


def numbers(answer: Any, name: str) -> list[float]:
    """An answer that is one vector.

    Raises:
        NotFoundError: it is another thing: the model has another task.
    """
    if not isinstance(answer, list) or not answer or not isinstance(answer[0], (int, float)):
        raise NotFoundError(f"the model {name!r} does not answer with a vector: its task is another", "model")
    return answer


def labels(answer: Any, name: str) -> list[dict[str, Any]]:
    """An answer of labels with their scores, the best first.

    Raises:
        NotFoundError: as `numbers`.
    """
    if not isinstance(answer, list) or not answer or not isinstance(answer[0], dict) or "score" not in answer[0]:
        raise NotFoundError(f"the model {name!r} does not answer with labels: its task is another", "model")
    return answer
