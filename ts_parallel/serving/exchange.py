"""What passes between whatever carries requests and whatever answers them: raw requests, replies, open jobs, news.

Knows no route and no transport: `torchserve` carries, `openai` and `batch` answer, and neither knows the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ts_parallel import long_json
from ts_parallel.errors import RequestError

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
EVENTS = "text/event-stream; charset=utf-8"  # without it some take the bytes for Latin-1
_LONGEST_ECHO = 60  # characters of a bad value that an error repeats
_encode = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` makes an encoder at every call
_LINE_ENDS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


@dataclass(frozen=True)
class RawRequest:
    """One request as TorchServe hands it over: a route (`v1/completions`, empty for the model's own URL) and a body.

    The body is parsed already where it was called JSON and is, else bytes or text, or None where there was none.
    """

    route: str
    body: Any
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict, compare=False)
    """By their names in small letters."""

    def text(self) -> str | None:
        """The body as raw text; None where it is JSON.

        Raises:
            RequestError: it is a form, which TorchServe has taken apart, or no text.
        """
        if "x-www-form-urlencoded" in self.content_type:
            raise RequestError("the body came as a form; send it with 'Content-Type: application/json' or 'text/plain'")
        if "json" in self.content_type or not isinstance(self.body, (bytes, bytearray, str)):
            return None
        try:
            text = self.body if isinstance(self.body, str) else bytes(self.body).decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"the body is neither JSON nor UTF-8 text: {error}") from None
        return None if text.lstrip().startswith("{") else text

    def fields(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            RequestError: it is none.
        """
        value = self.body
        if isinstance(value, (bytes, bytearray, str)):
            try:
                value = long_json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"the body is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise RequestError(f"the body must be a JSON object, got {echo(value)}")
        return value


def one_line(body: Any) -> str:
    """JSON that is one line by anybody's notion of lines: readers of events cut at more than JSON's own."""
    text = _encode(body)
    return text if text.isascii() else text.translate(_LINE_ENDS)


def error_body(error: RequestError) -> str:
    """An error in OpenAI's shape, which the native route shares, with its HTTP status beside: in a stream that has
    begun it stands nowhere else."""
    body = {"message": str(error), "type": error.kind, "param": error.parameter, "code": error.code}
    return json.dumps({"error": {**body, "status": error.status}})


ERROR: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "status": {"type": "integer"},
            },
            "required": ["message", "type", "param", "code", "status"],
        }
    },
    "required": ["error"],
}
"""What `error_body` makes, as a JSON schema."""
HERE: Mapping[str, Any] = {"servers": [{"url": ".", "description": "The model's own URL, with its version."}]}
"""Where the routes of a description are: beside it."""


@dataclass(frozen=True)
class Reply:
    """What one job is sent now; `status` and `content_type` count only the first time."""

    body: str
    is_first: bool
    is_last: bool
    status: int = 200
    content_type: str = JSON
    is_stream: bool = False
    """Whether its reader takes the answer in pieces, wherever it is cut."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """As `status`."""

    @property
    def stream_ends(self) -> bool | None:
        """What TorchServe is told: an answer that is first and last is no stream at all, and says nothing of one."""
        return None if self.is_first and self.is_last else self.is_last

    @staticmethod
    def whole(body: str, content_type: str = JSON) -> Reply:
        return Reply(body, is_first=True, is_last=True, content_type=content_type)

    @staticmethod
    def refusal(error: RequestError) -> Reply:
        return Reply(error_body(error), is_first=True, is_last=True, status=error.status, headers=error.headers)


News = TypeVar("News", contravariant=True)
MoreNews = TypeVar("MoreNews", covariant=True)


class OpenJob(Protocol[News]):
    """An answer on its way, to which there is news now and then."""

    def advance(self, delivery: News, /) -> Reply | None:
        """What to send for the news; None where there is nothing to send."""
        ...

    def fail(self, error: RequestError, /) -> Reply:
        """The last reply, where it cannot go on."""
        ...

    @property
    def is_whole(self) -> bool:
        """Whether it is known that its answer will be one piece of JSON."""
        ...


class Mailboxes(Protocol[MoreNews]):
    def wait(self, seconds: float, /) -> bool:
        """Whether there is news that is to go out, at the latest after `seconds`."""
        ...

    def take(self, request_id: str, /) -> MoreNews:
        """The news for one job since it was last asked for."""
        ...


class Door(Protocol[MoreNews]):
    """Where the news comes from: the engine's thread, or a handler's own threads (`torchserve.streaming`)."""

    @property
    def router(self) -> Mailboxes[MoreNews]: ...

    def abort(self, request_id: str) -> None:
        """Nobody wants its news any more, be it that it has ended."""
        ...


def echo(value: Any) -> str:
    text = _beginning(value, _LONGEST_ECHO)
    return text if len(text) <= _LONGEST_ECHO else text[:_LONGEST_ECHO] + "…"


def _beginning(value: Any, most: int) -> str:
    """`repr(value)`, or more than `most` letters of its beginning: all of it may be megabytes."""
    if isinstance(value, (str, bytes, bytearray)):
        return repr(value[: most + 1])
    if type(value) not in (list, dict):
        return repr(value)
    is_list = isinstance(value, list)
    text = "[" if is_list else "{"
    for number, own in enumerate(value):
        text += ", " if number else ""
        text += "" if is_list else f"{_beginning(own, most)}: "
        if len(text) > most:
            return text
        text += _beginning(own if is_list else value[own], most - len(text))
    return text + ("]" if is_list else "}")
