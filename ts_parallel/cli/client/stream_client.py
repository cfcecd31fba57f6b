"""A client of OpenAI-compatible servers on the standard library: streamed answers, each piece with the time it came.

Knows HTTP, server-sent events and OpenAI's shapes; no terminal, no statistics, no server of ours in particular.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ts_parallel.errors import ConfigError, TSParallelError

_BYTES_OF_A_READ = 1 << 16
_LONGEST_COMPLAINT = 300  # characters of a server's message that an error repeats
_END_MARK = "[DONE]"
_MAY_PASS = (429, 503)  # with Retry-After
_WORKER_DIED = "Worker died"  # TorchServe's own words, while it starts the next one
_SECONDS_OF_A_RESTART = 2.0
_MOST_LATER = 0.25  # of a wait, so that not all who were refused come at once


class RemoteError(TSParallelError):
    """A server that cannot be asked, refused, or failed. `status` is the HTTP status where it is one of an error."""

    def __init__(
        self,
        message: str,
        status: int | None = None,
        parameter: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """
        Args:
            retry_after: seconds after which the same may be asked again; None where it would be of no use.
        """
        super().__init__(message)
        self.status = status
        self.parameter = parameter
        self.retry_after = retry_after


@dataclass(frozen=True)
class Patience:
    """For how long a client asks again what may be asked again, and who is told each time, with the seconds to wait."""

    seconds: float = 0.0
    tell: Callable[[RemoteError, float], None] = lambda error, seconds: None


@dataclass(frozen=True)
class Usage:
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int  # those of the prompt that the server had computed before


@dataclass(frozen=True)
class Piece:
    """One server-sent event of an answer."""

    moment: float  # of `time.perf_counter()`, in seconds, when its last byte was read
    text: str
    finish_reason: str | None
    usage: Usage | None  # counted up to this piece; the last one of an answer is the answer's
    has_choice: bool  # False for the event that brings the usage alone
    reasoning: str = ""  # what a model of chats thinks before it answers


class Client:
    """Asks one server, each time on a connection of its own, so that several threads may share it.

    Args:
        url: the base URL that OpenAI's clients take, mostly one that ends in `/v1`.
        timeout: seconds that one whole answer may take, from connecting to its end.
        patience: with a server that is busy, or being started again. An answer that has begun is never asked for again.

    Raises:
        ConfigError: the URL is none, or the key cannot be sent.
    """

    def __init__(
        self, url: str, api_key: str | None = None, timeout: float = 600.0, patience: Patience | None = None
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ConfigError(f"{url!r} is no URL") from None
        is_plain = url.isascii() and url.isprintable() and " " not in url and not parts.query and not parts.fragment
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
            raise ConfigError(f"{url!r} is no URL such as http://127.0.0.1:8080/predictions/demo/1.0/v1")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key has characters that no HTTP header can carry")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._patience = patience or Patience()
        self._has_answered = False
        self._host, self._port, self._is_secure = parts.hostname, port, parts.scheme == "https"
        self._path = parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        """The names that `v1/models` lists.

        Raises:
            RemoteError: as `model_cards`.
        """
        return list(self.model_cards())

    def model_cards(self) -> dict[str, dict[str, Any]]:
        """What `v1/models` says of each, by name.

        Raises:
            RemoteError: it cannot be asked, or answered with no such list.
        """
        begin = time.perf_counter()
        while True:
            try:
                with self._exchange("GET", "models", None) as (_, chunks):
                    text = b"".join(chunks).decode(errors="replace")
                break
            except RemoteError as error:
                self._wait_or_raise(error, begin)
        try:
            return {str(entry["id"]): dict(entry) for entry in json.loads(text)["data"]}
        except (ValueError, KeyError, TypeError):
            raise RemoteError(f"{self.url}/models answered with no list of models: {_one_line(text)}") from None

    def complete(self, body: Mapping[str, Any]) -> Generator[Piece, None, None]:
        """The pieces of `v1/completions`' answer as they come. Closing the iterator ends the connection.

        Raises:
            RemoteError: the server cannot be reached, refused, failed midway, or took longer than the timeout.
        """
        return self._stream("completions", body)

    def chat(self, body: Mapping[str, Any]) -> Generator[Piece, None, None]:
        """As `complete`, of `v1/chat/completions`; a piece's text is its delta's content."""
        return self._stream("chat/completions", body)

    def _stream(self, route: str, body: Mapping[str, Any]) -> Generator[Piece, None, None]:
        begin, has_begun = time.perf_counter(), False
        while True:
            try:
                with closing(self._stream_once(route, body)) as pieces:
                    for piece in pieces:
                        has_begun = True
                        yield piece
                return
            except RemoteError as error:
                if has_begun:
                    raise
                self._wait_or_raise(error, begin)

    def _wait_or_raise(self, error: RemoteError, begin: float) -> None:
        """
        Args:
            begin: on `perf_counter`, when it was asked for the first time.

        Raises:
            RemoteError: the same, where it does not help to ask again, or patience is over.
        """
        wait = error.retry_after
        if wait is None or time.perf_counter() - begin + wait > self._patience.seconds:
            raise error
        self._patience.tell(error, wait)
        time.sleep(wait * (1 + _MOST_LATER * random.random()))

    def _stream_once(self, route: str, body: Mapping[str, Any]) -> Generator[Piece, None, None]:
        is_finished = False
        with self._exchange("POST", route, {**body, "stream": True}) as (response, chunks):
            kind = response.getheader("Content-Type", "")
            if not kind.startswith("text/event-stream"):
                text = b"".join(chunks).decode(errors="replace")
                message, parameter = _complaint(text)
                raise RemoteError(f"answered with {kind or 'no type'}, no stream of events: {message}", None, parameter)
            for moment, data in _events(chunks):
                if data == _END_MARK:
                    with suppress(OSError, http.client.HTTPException):  # the answer is whole, however the rest ends
                        for _ in chunks:  # a connection that is closed with bytes unread is reset, which servers log
                            pass
                    return
                piece = _piece(moment, data)
                is_finished |= piece.finish_reason is not None
                yield piece
        if not is_finished:  # some servers leave the end mark out, so a reason to finish is an end too
            raise RemoteError("the stream was cut off before its end")

    @contextmanager
    def _exchange(
        self, method: str, route: str, body: Mapping[str, Any] | None
    ) -> Iterator[tuple[http.client.HTTPResponse, Iterator[bytes]]]:
        """A response of status 200 and its bytes as they come; everything else is a `RemoteError`."""
        deadline = time.perf_counter() + self.timeout
        make = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        connection = make(self._host, self._port, timeout=self.timeout)
        try:
            try:
                connection.connect()
            except OSError as error:
                # A server that was never there is a wrong address; one that was may be there again.
                wait = _SECONDS_OF_A_RESTART if self._has_answered and isinstance(error, ConnectionError) else None
                text = f"cannot reach {self.url}: {error.strerror or error}"
                raise RemoteError(text, retry_after=wait) from None
            # A response that closes its connection takes the socket away from it, and timeouts are set on the socket.
            wire = connection.sock
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, f"{self._path}/{route}", payload, self._headers)
            wire.settimeout(_seconds_until(deadline))
            with connection.getresponse() as response:
                chunks = _chunks(response, wire, deadline)
                self._has_answered = True
                if (status := response.status) != 200:
                    message, parameter = _complaint(b"".join(chunks).decode(errors="replace"))
                    said = message or response.reason
                    wait = _seconds_to_wait(status, said, response.getheader("Retry-After"))
                    raise RemoteError(f"the server answered {status} to {route}: {said}", status, parameter, wait)
                yield response, chunks
        except TimeoutError:
            raise RemoteError(f"the answer took longer than {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise RemoteError(f"the connection broke: {_one_line(str(error)) or type(error).__name__}") from None
        finally:
            connection.close()


def _seconds_to_wait(status: int, said: str, retry_after: str | None) -> float | None:
    """Until the same may be asked again; None where nobody says that it may."""
    if status in _MAY_PASS and retry_after is not None and retry_after.strip().isdecimal():
        return float(retry_after)
    return _SECONDS_OF_A_RESTART if status >= 500 and _WORKER_DIED in said else None


def _seconds_until(deadline: float) -> float:
    if (seconds := deadline - time.perf_counter()) <= 0:
        raise TimeoutError
    return seconds


def _chunks(response: http.client.HTTPResponse, wire: socket.socket, deadline: float) -> Iterator[bytes]:
    """The body's bytes as they come, each wait no longer than what is left until the deadline."""
    while True:
        wire.settimeout(_seconds_until(deadline))
        if not (chunk := response.read1(_BYTES_OF_A_READ)):
            return
        yield chunk


def _events(chunks: Iterable[bytes]) -> Iterator[tuple[float, str]]:
    """The data of each server-sent event, with the moment at which it was whole."""
    rest = b""
    data: list[bytes] = []
    for chunk in chunks:
        moment = time.perf_counter()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield moment, b"\n".join(data).decode(errors="replace")
                data = []


def _piece(moment: float, data: str) -> Piece:
    """
    Raises:
        RemoteError: the event is an error, or nothing of OpenAI's.
    """
    try:
        event = json.loads(data)
        if event.get("error"):
            raise RemoteError(_complaint(data)[0])
        choice = event["choices"][0] if event.get("choices") else {}
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or ""
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        usage = _usage(event["usage"]) if event.get("usage") else None
        return Piece(moment, str(text), choice.get("finish_reason"), usage, bool(choice), str(reasoning))
    except (ValueError, AttributeError, KeyError, TypeError):
        raise RemoteError(f"the stream has an event that is none of OpenAI's: {_one_line(data)}") from None


def _usage(fields: Mapping[str, Any]) -> Usage:
    details = fields.get("prompt_tokens_details") or {}
    return Usage(
        int(fields["prompt_tokens"]), int(fields.get("completion_tokens") or 0), int(details.get("cached_tokens") or 0)
    )


def _complaint(text: str) -> tuple[str, str | None]:
    """What an error's body says in one line, and the field it blames.

    OpenAI's shape is `{"error": {"message", "param"}}`; TorchServe's own and older servers' have it at the top,
    FastAPI's call it `detail`.
    """
    try:
        body = json.loads(text)
    except ValueError:
        return _one_line(text), None
    inner = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(inner, dict):
        return _one_line(str(inner)), None
    message = inner.get("message") or inner.get("detail") or text
    parameter = inner.get("param")
    return _one_line(str(message)), parameter if isinstance(parameter, str) else None


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_COMPLAINT else line[:_LONGEST_COMPLAINT] + "…"
