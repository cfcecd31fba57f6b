"""Server-sent events of an upstream: passed on whole, or read one by one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from ts_parallel.gateway.refusals import UpstreamError, UpstreamRefusal
from ts_parallel.gateway.upstream.exchange import Exchange

EVENTS = "text/event-stream"
_END = b"\n\n"
_DONE = "[DONE]"


def is_stream(exchange: Exchange) -> bool:
    return exchange.headers.get("content-type", "").startswith(EVENTS)


async def whole_events(exchange: Exchange) -> AsyncIterator[bytes]:
    """The very bytes of the stream, cut behind events alone: of one that is cut off inside, nothing is shown.

    Raises:
        RequestError: the stream does not come to its end.
    """
    rest = b""
    while piece := await exchange.read():
        if rest:
            piece = rest + piece
            rest = b""
        if not piece.endswith(_END):
            end = piece.rfind(_END) + len(_END) if _END in piece else 0
            piece, rest = piece[:end], piece[end:]
        if piece:
            yield piece
    if rest:
        yield rest


async def bodies_of_events(exchange: Exchange) -> AsyncIterator[dict[str, Any]]:
    """What each event says, up to the mark that closes a stream of OpenAI's.

    Raises:
        RequestError: the stream tells of an error, says what is no JSON, or ends without its mark.
    """
    async for events in whole_events(exchange):
        for event in events.decode("utf-8", "replace").split("\n\n"):
            text = "\n".join(
                line.removeprefix("data:").lstrip(" ") for line in event.split("\n") if line.startswith("data:")
            )
            if text == _DONE:
                return
            if text:
                yield _body(text)
    raise UpstreamError("the model's stream ended without its end mark")


def _body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError:
        raise UpstreamError(f"the model's stream has an event that is no JSON: {text[:80]!r}") from None
    if not isinstance(body, dict):
        raise UpstreamError(f"the model's stream has an event that is no object: {text[:80]!r}")
    error = body.get("error")
    if isinstance(error, dict):
        status = error.get("status") if isinstance(error.get("status"), int) else error.get("code")
        raise UpstreamRefusal(
            status if isinstance(status, int) and 400 <= status < 600 else 500,
            str(error.get("message")),
            error.get("param"),
            str(error.get("type") or "server_error"),
            error.get("code"),
        )
    return body


def failed_events(body: dict[str, Any]) -> bytes:
    """The last events of a stream of OpenAI's that cannot go on."""
    return f"data: {json.dumps(body)}\n\ndata: {_DONE}\n\n".encode()
