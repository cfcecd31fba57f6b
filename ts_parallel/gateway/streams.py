"""Answers of server-sent events: sent as they are made, and ended together with what makes them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# What proxies on the way must not gather, and nobody may keep.
_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Sends what `events` makes. Owns it, and closes it when the answer ends, however it does."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b""})


def named_event(name: str, body: dict[str, Any]) -> bytes:
    """An event with a type, as OpenAI's responses and Anthropic's messages have them."""
    return f"event: {name}\ndata: {json.dumps(body)}\n\n".encode()
