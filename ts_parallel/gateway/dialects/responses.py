"""OpenAI's `v1/responses`: made of chat completions, and remembered for a while."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ts_parallel.errors import NotFoundError, RequestError
from ts_parallel.gateway.described.fields import body_of, check_types
from ts_parallel.gateway.dialects.chat import ChatAnswer, ask_chat
from ts_parallel.gateway.dialects.responses_input import FIELDS, messages_of, parse_turn
from ts_parallel.gateway.dialects.responses_output import Event, ResponseWriter
from ts_parallel.gateway.passing import headers_to_pass, read_fields
from ts_parallel.gateway.refusals import json_answer
from ts_parallel.gateway.streams import EventStream, named_event
from ts_parallel.gateway.upstream.models import Upstreams

_MOST_REMEMBERED = 1000
_MOST_BYTES_REMEMBERED = 64 << 20


RESPONSE = body_of(FIELDS, "input")


class UnknownResponseError(NotFoundError):
    kind = "invalid_request_error"
    code = "previous_response_not_found"


@dataclass(frozen=True)
class _Remembered:
    response: dict[str, Any]
    messages: list[dict[str, Any]]
    """Of all turns up to this answer's, without instructions."""
    found: list[dict[str, Any]]
    """Tools that searches have brought."""
    num_bytes: int


class ResponseStore:
    """Owns the responses that can be gone on from: the last ones, in memory, gone when the gateway ends."""

    def __init__(self, most: int = _MOST_REMEMBERED, most_bytes: int = _MOST_BYTES_REMEMBERED) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._by_id: OrderedDict[str, _Remembered] = OrderedDict()

    def keep(
        self, response: dict[str, Any], messages: list[dict[str, Any]], found: Sequence[dict[str, Any]] = ()
    ) -> None:
        own = [response, messages, *([list(found)] if found else [])]
        size = len(json.dumps(own))
        if size > self._most_bytes:
            return
        self._by_id[response["id"]] = _Remembered(response, messages, list(found), size)
        self._num_bytes += size
        while len(self._by_id) > self._most or self._num_bytes > self._most_bytes:
            self._num_bytes -= self._by_id.popitem(last=False)[1].num_bytes

    def find(self, response_id: Any, parameter: str | None = None) -> _Remembered:
        """
        Raises:
            UnknownResponseError: there is none of that id, or none any more.
        """
        if response_id not in self._by_id:
            raise UnknownResponseError(
                f"the response {response_id!r} is not known: it was not stored, is too old, or the gateway has been "
                "started since; send the whole conversation in 'input'",
                parameter,
            )
        self._by_id.move_to_end(response_id)
        return self._by_id[response_id]

    def forget(self, response_id: str) -> None:
        """
        Raises:
            UnknownResponseError: as `find`.
        """
        self._num_bytes -= self.find(response_id).num_bytes
        del self._by_id[response_id]


class Responses:
    """The routes below `v1/responses`. Owns the store; the models are lent."""

    def __init__(self, upstreams: Upstreams, store: ResponseStore) -> None:
        self._upstreams = upstreams
        self._store = store

    async def create(self, request: Request) -> Response:
        """`POST /v1/responses`."""
        body = await read_fields(await request.body())
        check_types(body, FIELDS)
        upstream = self._upstreams.named(body.get("model"))
        await upstream.check_kind(generates_text=True)
        before: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        if body.get("previous_response_id") is not None:
            last = self._store.find(body["previous_response_id"], "previous_response_id")
            before, found = last.messages, last.found
        turn = parse_turn(body, found)
        answer = await ask_chat(upstream, turn.chat_fields(before), headers_to_pass(request))
        writer = ResponseWriter(body, upstream.name, turn)
        messages = [*before, *turn.messages]
        made = _Made(answer, writer, messages, turn.found, self._store if body.get("store", True) else None)
        if body.get("stream"):
            return EventStream(made.stream())
        await made.whole()
        return json_answer(writer.response)

    async def retrieve(self, request: Request) -> Response:
        """`GET /v1/responses/ID`."""
        return json_answer(self._store.find(request.path_params["id"]).response)

    async def delete(self, request: Request) -> Response:
        """`DELETE /v1/responses/ID`."""
        response_id = request.path_params["id"]
        self._store.forget(response_id)
        return json_answer({"id": response_id, "object": "response", "deleted": True})


class _Made:
    """One response in the making. Owns the answer that it is made of."""

    def __init__(
        self,
        answer: ChatAnswer,
        writer: ResponseWriter,
        messages: list[dict[str, Any]],
        found: list[dict[str, Any]],
        store: ResponseStore | None,
    ) -> None:
        self._answer = answer
        self._writer = writer
        self._messages = messages
        self._found = found
        self._store = store

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            for event in self._writer.begin():
                yield _bytes(event)
            try:
                async for delta in self._answer.deltas():
                    events = b"".join(map(_bytes, self._writer.add(delta)))
                    if events:
                        yield events
                last = self._writer.end()
            except RequestError as error:
                self._answer.failed()
                last = self._writer.fail(error)
            events = b"".join(map(_bytes, last))
            self._keep()
            yield events
        finally:
            self._answer.close()

    async def whole(self) -> None:
        """
        Raises:
            RequestError: the answer does not come to its end.
        """
        try:
            async for delta in self._answer.deltas():
                list(self._writer.add(delta))
            list(self._writer.end())
            self._keep()
        except RequestError:
            self._answer.failed()
            raise
        finally:
            self._answer.close()

    def _keep(self) -> None:
        response = self._writer.response
        if self._store is not None and response["status"] != "failed":
            self._store.keep(response, [*self._messages, *messages_of(response["output"])], self._found)


def _bytes(event: Event) -> bytes:
    return named_event(event["type"], event)
