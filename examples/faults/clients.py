"""Clients that wait for answers while a server is harmed, and what each of them saw."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PROMPTS = (
    "Return a new list containing", "Open the file", "This module", "The name of the class", "Raise an error if",
    "A string with no items", "Write the bytes", "Convert the number", "Call the function", "Test that the value",
    "Remove the first item", "Read a line from", "The default is", "If the argument is", "Create a directory",
    "Compare the two", "Split the text", "Parse the header",
)  # fmt: skip
LONGEST = 460
_WHOLE = "whole"
_SECONDS_OF_A_WHOLE_ANSWER = 60.0
_SHOWN = 12  # characters by which the start of an answer is told from others


@dataclass(frozen=True)
class Ask:
    """A greedy request, answered as text in pieces, as server-sent events, or at once."""

    prompt: str
    shape: str = "text"
    max_tokens: int = LONGEST

    def route(self, path: str) -> str:
        return f"{path}/1.0/v1/completions" if self.shape == "events" else path

    def body(self) -> bytes:
        fields = {"prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": True}
        return json.dumps({**fields, "stream": self.shape != _WHOLE}).encode()


@dataclass
class Seen:
    """What one client saw. `end` is what its answer ended by, empty as long as it has not."""

    ask: Ask
    text: str = ""
    end: str = ""
    began_at: float = 0.0
    last_at: float = 0.0
    """When the newest piece came."""
    ended_at: float = 0.0
    has_begun: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def is_whole(self) -> bool:
        return self.end == _WHOLE

    def is_silent(self, now: float, since: float, seconds: float) -> bool:
        """Whether nothing has come for longer than that; whole answers have the time of one."""
        beside = _SECONDS_OF_A_WHOLE_ANSWER if self.ask.shape == _WHOLE else 0.0
        return now - max(since, self.last_at) > seconds + beside


class Client(threading.Thread):
    """One request, read to its end. `leave` breaks it off from outside."""

    def __init__(self, url: str, ask: Ask, seconds: float = 600) -> None:
        super().__init__(name=ask.prompt, daemon=True)
        self._url = urlsplit(url)
        self._seconds = seconds
        self._connection: http.client.HTTPConnection | None = None
        self._has_left = False
        self.seen = Seen(ask)

    def run(self) -> None:
        seen = self.seen
        seen.began_at = time.monotonic()
        try:
            end = self._read()
        except TimeoutError:
            end = "silence"
        except (OSError, http.client.HTTPException, ValueError) as error:
            end = "cut off" if seen.text else f"cut off, nothing sent ({type(error).__name__})"
        seen.ended_at = time.monotonic()
        seen.end = "" if self._has_left else end
        seen.has_begun.set()

    def leave(self) -> None:
        self._has_left = True
        if self._connection is not None and self._connection.sock is not None:
            try:
                self._connection.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _read(self) -> str:
        seen, ask = self.seen, self.seen.ask
        self._connection = http.client.HTTPConnection(self._url.hostname or "", self._url.port, timeout=self._seconds)
        try:
            headers = {"Content-Type": "application/json"}
            self._connection.request("POST", ask.route(self._url.path), ask.body(), headers)
            response = self._connection.getresponse()
            if ask.shape == _WHOLE or response.status != 200:
                body = response.read().decode()
                if response.status != 200:
                    return _refusal(response, body)
                seen.text = json.loads(body)["text"]
                return _WHOLE
            received = b""
            while piece := response.read1():
                received += piece
                self._note(received)
            return _WHOLE if not (error := _error_in(received, ask.shape)) else error
        finally:
            self._connection.close()

    def _note(self, received: bytes) -> None:
        seen = self.seen
        seen.text = text_of(received, seen.ask.shape)
        seen.last_at = time.monotonic()
        seen.has_begun.set()


def text_of(received: bytes, shape: str) -> str:
    """The text of an answer as far as it has come."""
    if shape == "text":
        return received.decode(errors="ignore").partition('{"error"')[0]
    return "".join(str(choice["text"]) for event in _events(received) if event for choice in event.get("choices", ()))


def _events(received: bytes) -> list[dict[str, list[dict[str, str]]]]:
    """Those that are whole; the closing one as an empty one."""
    lines = [event.partition(b"data: ")[2] for event in received.split(b"\n\n")[:-1]]
    return [{} if line == b"[DONE]" else json.loads(line) for line in lines if line]


def _error_in(received: bytes, shape: str) -> str:
    if shape == "text":
        return "error event" if b'{"error"' in received else ""
    events = _events(received)
    if any("error" in event for event in events):
        return "error event"
    return "" if events and not events[-1] else "an end without [DONE]"


def _refusal(response: http.client.HTTPResponse, body: str) -> str:
    status = str(response.status)
    try:
        json.loads(body)
    except ValueError:
        return f"{status} without JSON"
    return f"{status} without Retry-After" if status == "429" and response.headers["Retry-After"] is None else status


def is_of(seen: Seen, expected: dict[str, str]) -> str:
    """ "right", as far as it has come, "of another" request, or "wrong"."""
    own = expected[seen.ask.prompt][: len(seen.text)] if not seen.is_whole else expected[seen.ask.prompt]
    if seen.text == own:
        return "right"
    others = [text for prompt, text in expected.items() if prompt != seen.ask.prompt]
    start = seen.text[:_SHOWN]
    return "of another" if len(start) == _SHOWN and any(text.startswith(start) for text in others) else "wrong"
