"""One HTTP request and its answer, piece by piece, over a connection of its own.

A connection is made for each request: on loopback that costs a fifth of a millisecond, none can turn out to be closed
already when it is written to, and to close it tells TorchServe that nobody waits any more. Knows HTTP; no routes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, cast

import httptools

from ts_parallel.errors import RequestError
from ts_parallel.gateway.refusals import SilentUpstreamError, UnavailableError, UpstreamError

_SECONDS_TO_CONNECT = 5.0
# Has the model end a request whose client leaves before its whole answer is there. For that such an answer may begin
# before it is known how it ends.
MAY_LEAVE: Mapping[str, str] = {"X-Client-May-Leave": "true"}
_BEGAN_EARLY = "ts_stream_next"  # TorchServe's own header
_MOST_BYTES_AHEAD = 1 << 18  # of an answer that is not read yet; beyond it the upstream has to wait


class Exchange(asyncio.Protocol):
    """Owns one connection and what came over it."""

    def __init__(self, who: str, max_silence: float) -> None:
        """
        Args:
            who: of whom errors speak.
            max_silence: seconds for which nothing may come while something is waited for.
        """
        self._loop = asyncio.get_running_loop()
        self._who = who
        self._max_silence = max_silence
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._head: asyncio.Future[None] = self._loop.create_future()
        self._more: asyncio.Future[None] | None = None
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._is_paused = False
        self._is_complete = False
        self._error: RequestError | None = None
        self._last = self._loop.time()
        self._timer = self._loop.call_later(max_silence, self._look)
        self.status = 0
        self.headers: dict[str, str] = {}
        """Names in lower case."""

    async def begin(self, host: str, port: int, is_https: bool, request: bytes) -> None:
        """Send `request`, and return once the answer's head is there.

        Raises:
            UnavailableError: nobody listens.
            UpstreamError, SilentUpstreamError: there is no answer.
        """
        connecting = self._loop.create_connection(lambda: self, host, port, ssl=is_https or None)
        try:
            await asyncio.wait_for(connecting, _SECONDS_TO_CONNECT)
        except (OSError, TimeoutError):
            self.close()
            raise UnavailableError(f"{self._who} is not up: nobody answers at {host}:{port}; try again later") from None
        except BaseException:
            self.close()
            raise
        assert self._transport is not None
        self._last = self._loop.time()
        self._transport.write(request)
        try:
            await self._head
        except BaseException:
            self.close()
            raise

    async def read(self) -> bytes:
        """The next bytes of the body, as many as there are; none at its end.

        Raises:
            UpstreamError, SilentUpstreamError: it does not come to its end.
        """
        if not self._pieces and not self._is_complete and self._error is None:
            self._more = self._loop.create_future()
            try:
                await self._more
            finally:
                self._more = None
        if self._pieces:
            body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces.clear()
            self._num_bytes = 0
            if self._is_paused and self._transport is not None:
                self._is_paused = False
                self._last = self._loop.time()
                self._transport.resume_reading()
            return body
        if self._error is not None:
            raise self._error
        return b""

    async def read_all(self) -> bytes:
        """The rest of the body.

        Raises:
            UpstreamError, SilentUpstreamError: as `read`.
        """
        pieces = []
        while piece := await self.read():
            pieces.append(piece)
        return b"".join(pieces)

    async def read_whole(self) -> tuple[int, bytes]:
        """Status and body of a whole answer. Where its head had to come before its end (`MAY_LEAVE`), an error in the
        body has the status.

        Raises:
            UpstreamError, SilentUpstreamError: as `read`.
            UnavailableError: it was cut off, and may be asked for once more.
        """
        began_early = self.status == 200 and _BEGAN_EARLY in self.headers
        try:
            body = await self.read_all()
        except UpstreamError as error:
            raise UnavailableError(f"{error}; try again later") if began_early else error from None
        if not began_early or not body.startswith(b'{"error"'):
            return self.status, body
        try:
            status = json.loads(body)["error"]["status"]
        except (ValueError, LookupError, TypeError):
            return self.status, body
        return (status if isinstance(status, int) and 400 <= status < 600 else self.status), body

    def close(self) -> None:
        """Nobody waits for the answer any more."""
        self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        if not self._head.done():
            self._head.cancel()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._last = self._loop.time()
        if self._is_complete:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(UpstreamError(f"{self._who} answers what is no HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        if self._is_complete or self._error is not None:
            return
        is_open_ended = self._head.done() and not {"content-length", "transfer-encoding"} & self.headers.keys()
        if is_open_ended and error is None:
            self.on_message_complete()
        else:
            when = "before it answered" if not self._head.done() else "in the middle of its answer"
            self._fail(UpstreamError(f"{self._who} ended the connection {when}"))

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status >= 200 and not self._head.done():
            self._head.set_result(None)

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._num_bytes += len(body)
        if self._num_bytes > _MOST_BYTES_AHEAD and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        if self.status < 200:  # "100 Continue" and its like come before the answer
            self.headers.clear()
            return
        self._is_complete = True
        self._timer.cancel()
        self._wake()

    def _look(self) -> None:
        """Now and then, whether it has been silent for too long. Where its reader is the slow one, it has not."""
        now = self._loop.time()
        silence = 0.0 if self._is_paused or self._pieces else now - self._last
        if silence >= self._max_silence:
            self._fail(SilentUpstreamError(f"{self._who} said nothing for {self._max_silence:g} s (--timeout)"))
        else:
            self._timer = self._loop.call_later(self._max_silence - silence, self._look)

    def _fail(self, error: RequestError) -> None:
        self._error = error
        self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        if not self._head.done():
            self._head.set_exception(error)
        self._wake()

    def _wake(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)


def request_bytes(method: str, target: str, host: str, headers: dict[str, str], body: bytes) -> bytes:
    """A whole request, after whose answer the connection is closed."""
    fields: dict[str, Any] = {"Host": host, **headers, "Content-Length": len(body), "Connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body
