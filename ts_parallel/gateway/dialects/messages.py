"""Anthropic's `v1/messages`: made of chat completions."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from ts_parallel.errors import RequestError
from ts_parallel.gateway.described.fields import body_of, check_types
from ts_parallel.gateway.dialects.chat import ChatAnswer, ask_chat
from ts_parallel.gateway.dialects.messages_input import FIELDS, chat_fields, prompt_fields, stop_sequences
from ts_parallel.gateway.dialects.messages_output import Event, MessageWriter
from ts_parallel.gateway.passing import headers_to_pass, read_fields, written
from ts_parallel.gateway.refusals import UpstreamError, json_answer
from ts_parallel.gateway.streams import EventStream, named_event
from ts_parallel.gateway.upstream.models import Upstreams

MESSAGE = body_of(FIELDS, "messages", "max_tokens")
COUNTED = body_of(FIELDS, "messages")


class Messages:
    """The routes below `v1/messages`. The models are lent."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    async def create(self, request: Request) -> Response:
        """`POST /v1/messages`."""
        body = await read_fields(await request.body())
        check_types(body, FIELDS)
        upstream = self._upstreams.named(body.get("model"))
        await upstream.check_kind(generates_text=True)
        fields = chat_fields(body)
        answer = await ask_chat(upstream, fields, headers_to_pass(request))
        writer = MessageWriter(upstream.name, stop_sequences(body))
        if body.get("stream"):
            return EventStream(_stream(answer, writer))
        try:
            async for delta in answer.deltas():
                list(writer.add(delta))
        except RequestError:
            answer.failed()
            raise
        finally:
            answer.close()
        list(writer.end())
        return json_answer(writer.message)

    async def count(self, request: Request) -> Response:
        """`POST /v1/messages/count_tokens`."""
        body = await read_fields(await request.body())
        check_types(body, FIELDS)
        upstream = self._upstreams.named(body.get("model"))
        await upstream.check_kind(generates_text=True)
        asked = await written({**prompt_fields(body), "add_generation_prompt": True})
        async with upstream.asked("POST", "tokenize", asked, headers_to_pass(request)) as exchange:
            counted = await upstream.whole(exchange)
            try:
                return json_answer({"input_tokens": json.loads(counted)["count"]})
            except (ValueError, LookupError, TypeError):
                raise UpstreamError("the model counts tokens in no shape that is known") from None


async def _stream(answer: ChatAnswer, writer: MessageWriter) -> AsyncGenerator[bytes, None]:
    try:
        try:
            async for delta in answer.deltas():
                events = b"".join(map(_bytes, writer.add(delta)))
                if events:
                    yield events
            last = writer.end()
        except RequestError as error:
            answer.failed()
            last = writer.fail(error)
        yield b"".join(map(_bytes, last))
    finally:
        answer.close()


def _bytes(event: Event) -> bytes:
    return named_event(event["type"], event)
