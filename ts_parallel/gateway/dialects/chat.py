"""A model's chat completion as other dialects read it: asked for with OpenAI's fields, answered in deltas."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from ts_parallel.errors import RequestError
from ts_parallel.gateway.passing import written
from ts_parallel.gateway.refusals import UpstreamError
from ts_parallel.gateway.upstream.events import bodies_of_events, is_stream
from ts_parallel.gateway.upstream.exchange import Exchange
from ts_parallel.gateway.upstream.models import Upstream

_ROUTE = "v1/chat/completions"


@dataclass(frozen=True)
class Usage:
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0


@dataclass(frozen=True)
class CallPiece:
    """A part of a tool call: its first has id and name."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What an answer has more than before; a whole answer is one of these."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()
    logprobs: tuple[dict[str, Any], ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None


class ChatAnswer:
    """One choice of one chat completion. Owns its exchange, to be closed by whoever asked."""

    def __init__(self, upstream: Upstream, exchange: Exchange) -> None:
        self._upstream = upstream
        self._exchange = exchange

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """All of them, up to one with a finish reason and one with the usage.

        Raises:
            RequestError: the answer does not come to its end.
        """
        is_finished = False
        try:
            if is_stream(self._exchange):
                async for body in bodies_of_events(self._exchange):
                    delta = _delta(body, "delta")
                    is_finished = is_finished or delta.finish_reason is not None
                    yield delta
            else:
                delta = _delta(_object(await self._upstream.whole(self._exchange)), "message")
                is_finished = delta.finish_reason is not None
                yield delta
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise UpstreamError(f"the model's answer has no shape that is known: {error!r}") from None
        if not is_finished:
            raise UpstreamError("the model's answer ended without a reason")

    def failed(self) -> None:
        self._upstream.is_ready = False

    def close(self) -> None:
        self._exchange.close()


async def ask_chat(upstream: Upstream, fields: Mapping[str, Any], headers: Mapping[str, str]) -> ChatAnswer:
    """
    Args:
        fields: of a chat completion; the model's name is put in here.

    Raises:
        RequestError: the model refuses, or does not answer.
    """
    own = {**fields, "model": upstream.served_name}
    if own.get("stream"):  # the counts are wanted with the first event already
        own["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    exchange = await upstream.ask("POST", _ROUTE, await written(own), headers)
    if exchange.status >= 400:
        try:
            await upstream.whole(exchange)  # which raises what it says
        finally:
            exchange.close()
    return ChatAnswer(upstream, exchange)


def _object(body: bytes) -> dict[str, Any]:
    found = json.loads(body)
    if not isinstance(found, dict):
        raise TypeError("no object")
    return found


def _delta(body: dict[str, Any], part: str) -> Delta:
    usage = _usage(body["usage"]) if body.get("usage") else None
    if not body.get("choices"):
        return Delta(usage=usage)
    choice = body["choices"][0]
    said = choice.get(part) or {}
    return Delta(
        said.get("content") or "",
        said.get("reasoning_content") or said.get("reasoning") or "",
        tuple(_call(number, call) for number, call in enumerate(said.get("tool_calls") or ())),
        tuple((choice.get("logprobs") or {}).get("content") or ()),
        choice.get("finish_reason"),
        usage,
    )


def _call(number: int, call: dict[str, Any]) -> CallPiece:
    function = call.get("function") or {}
    return CallPiece(call.get("index", number), call.get("id"), function.get("name"), function.get("arguments") or "")


def _usage(usage: dict[str, Any]) -> Usage:
    return Usage(
        usage["prompt_tokens"],
        usage.get("completion_tokens") or 0,
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0,
    )


def texts_of(content: Any, place: str) -> str:
    """A content of texts alone: a text, or a list of parts that have one.

    Raises:
        RequestError: there is a part of another kind.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RequestError(f"{place} must be a text or a list of parts, got {type(content).__name__}", place)
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RequestError(f"{place}.{number}: only texts can be read here, got {kind!r}", place)
        texts.append(text)
    return "\n".join(texts)
