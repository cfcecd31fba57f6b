"""What every request goes through: its id, its key, its body within the limit, and whether its client is still there.

A client that leaves ends what was begun for it at once, so that its upstream hears of it.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ts_parallel.errors import RequestError
from ts_parallel.gateway.counters import Counters
from ts_parallel.gateway.refusals import BodyTimedOutError, BodyTooLargeError, UnauthorizedError, refusal
from ts_parallel.gateway.settings import GatewaySettings

# Who watches over a gateway has no key, and a page has none before it is there.
OPEN_PATHS = frozenset({"/", "/page.js", "/page.css", "/health", "/live", "/ready", "/metrics"})
_OPEN_BEGINNING = "/v2/health/"
_SECONDS_BETWEEN_PIECES = 60.0  # of a body
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,200}")


class Guard:
    """Around all routes. Owns which keys open them."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings, counters: Counters) -> None:
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]
        self._most_bytes = settings.max_request_size
        self._counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        answer = _Answer(send, _request_id(headers))
        scope["request_id"] = answer.request_id
        with self._counters.open(scope, answer):
            try:
                self._check_key(scope["path"], headers)
                body = await self._read(headers, receive)
            except RequestError as error:
                await refusal(scope["path"], error)(scope, receive, answer.send)
                return
            if body is not None:
                await _while_wanted(self._app(scope, _replay(body, answer), answer.send), receive, answer)

    def _check_key(self, path: str, headers: Mapping[str, str]) -> None:
        """
        Raises:
            UnauthorizedError: the path is not open, and the key is none of ours.
        """
        if not self._keys or is_open(path):
            return
        key = given_key(headers)
        if key is None:
            raise UnauthorizedError("no API key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        if not any([hmac.compare_digest(key.encode(), own) for own in self._keys]):
            raise UnauthorizedError("this API key is wrong")

    async def _read(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        """The whole body; None where its client left meanwhile.

        Raises:
            BodyTooLargeError: it has, or is said to have, more bytes than may be. The rest is not read.
            BodyTimedOutError: it stopped coming.
        """
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._most_bytes:
            raise self._too_large(f"{length} bytes")
        pieces, size = [], 0
        while True:
            try:
                message = await asyncio.wait_for(receive(), _SECONDS_BETWEEN_PIECES)
            except TimeoutError:
                raise BodyTimedOutError(f"no more of the body came for {_SECONDS_BETWEEN_PIECES:g} s") from None
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._most_bytes:
                raise self._too_large("more bytes")
            if not message.get("more_body"):
                return b"".join(pieces)

    def _too_large(self, size: str) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body has {size}, this gateway takes {self._most_bytes} (--max-request-size)")


class _Answer:
    """One answer on its way out. Owns what is known of it."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status = 0
        self.first_byte_at: float | None = None
        self.is_whole = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        elif self.first_byte_at is None:
            self.first_byte_at = time.monotonic()
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.is_whole = True
        await self._send(message)


def is_open(path: str) -> bool:
    """Whether nobody is asked for a key there."""
    return path in OPEN_PATHS or path.startswith(_OPEN_BEGINNING)


def given_key(headers: Mapping[str, str]) -> str | None:
    """As OpenAI's clients send it, or as Anthropic's or Azure's do."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key") or headers.get("api-key")


def _request_id(headers: Mapping[str, str]) -> str:
    """The client's own, where it can stand in a header."""
    own = headers.get("x-request-id", "")
    return own if _REQUEST_ID.fullmatch(own) else f"req_{uuid.uuid4().hex}"


def _replay(body: bytes, answer: _Answer) -> Receive:
    """The body once more; whoever asks further waits for the end, for nothing else comes."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody sets it")

    return receive


async def _while_wanted(work: Awaitable[None], receive: Receive, answer: _Answer) -> None:
    """Do `work` to its end, or until the client leaves."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_left(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and not answer.is_whole:
            working.cancel()
        with suppress(asyncio.CancelledError):
            await working
    finally:
        working.cancel()
        watching.cancel()


async def _until_left(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
