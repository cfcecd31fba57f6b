"""A small OpenAI-compatible server for tests of clients: it streams events as ours does, and can misbehave.

It has the same routes below `/predictions/demo/1.0`, as TorchServe has them.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Refusal(Exception):
    """Raised by an answer before its first piece: it becomes the response, `body` as it is or in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, parameter: str | None = None, body: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        error = {"message": message, "type": "invalid_request_error", "param": parameter, "code": status}
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = json.dumps({"error": error}) if body is None else body


class Cut(Exception):
    """Raised by an answer: the connection ends here, in the middle of the stream."""


Answer = Callable[[dict[str, Any]], Iterator[bytes]]


@dataclass
class Recorder:
    """What a server has seen, and how it answers. `answers` may be changed while it runs."""

    url: str
    answers: dict[str, Answer]
    models: list[str] = field(default_factory=lambda: ["demo"])
    card: dict[str, Any] = field(default_factory=dict)  # what each model's entry has beside its id
    bodies: list[dict[str, Any]] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)  # of `time.perf_counter()` at which the bodies came
    keys: list[str | None] = field(default_factory=list)
    keys_of_gets: list[str | None] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)  # of each request, names in lower case
    reads: Callable[[str, bytes], Any] | None = None  # bodies that need not be JSON, with their content type
    num_running: int = 0
    most_running: int = 0
    has_left: threading.Event = field(default_factory=threading.Event)  # a client went before its answer's end
    stop: threading.Event = field(default_factory=threading.Event)  # cuts what still runs when a test ends
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def load_bodies(self) -> list[dict[str, Any]]:
        """Those of a bench's load, without the probe's and the warm-up's."""
        return self.bodies[2:]


def event(body: dict[str, Any] | str) -> bytes:
    return f"data: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}\n\n".encode()


END = event("[DONE]")


def chunk(text: str, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], **more}


def usage(num_prompt: int, num_completion: int, num_cached: int = 0) -> dict[str, Any]:
    counts: dict[str, Any] = {"prompt_tokens": num_prompt, "completion_tokens": num_completion}
    return {**counts, "prompt_tokens_details": {"cached_tokens": num_cached}} if num_cached else counts


def steady(delay: float = 0.0, gap: float = 0.0, tokens_of_a_piece: int = 1, num_cached: int = 0) -> Answer:
    """`max_tokens` tokens, the first piece after `delay` seconds, the next ones `gap` seconds apart."""

    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        options = body.get("stream_options") or {}
        prompt, total = body["prompt"], body["max_tokens"]
        num_prompt = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        time.sleep(delay)
        for first in range(0, total, tokens_of_a_piece):
            if first:
                time.sleep(gap)
            end = min(first + tokens_of_a_piece, total)
            text = "".join(f"t{number} " for number in range(first, end))
            each = {"usage": usage(num_prompt, end)} if options.get("continuous_usage_stats") else {}
            yield event(chunk(text, "length" if end == total else None, **each))
        if options.get("include_usage"):
            yield event({"id": "c", "choices": [], "usage": usage(num_prompt, total, num_cached)})
        yield END

    return answer


def chat(*texts: str) -> Answer:
    """The texts as deltas, after one that has the role alone."""

    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        yield event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
        for text in texts:
            yield event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield END

    return answer


def whole(body: Any) -> Answer:
    """No stream but one object."""

    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        raise Refusal(200, "", body=json.dumps(body))
        yield  # which makes it an iterator

    return answer


@contextmanager
def running(**answers: Answer) -> Iterator[Recorder]:
    """A server of `completions` and `chat`, those of them that are given, on a port of its own."""
    with running_at(0, **answers) as recorder:
        yield recorder


@contextmanager
def running_at(port: int, **answers: Answer) -> Iterator[Recorder]:
    server = _Server(("127.0.0.1", port), _Handler)
    recorder = Recorder(f"http://127.0.0.1:{server.server_address[1]}/v1", answers)
    server.recorder = recorder  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield recorder
    finally:
        recorder.stop.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that leaving waits for the answers, and no test sees another's

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are no errors here; all others are."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0  # each piece leaves at once

    @property
    def recorder(self) -> Recorder:
        recorder: Recorder = self.server.recorder  # type: ignore[attr-defined]
        return recorder

    @property
    def route(self) -> str:
        return self.path.removeprefix("/predictions/demo/1.0")

    def do_GET(self) -> None:
        self.recorder.keys_of_gets.append(self.headers.get("Authorization"))
        if self.route == "/health":
            self._send(200, '{"status": "ok"}')
        elif self.route == "/v1/models" and self.recorder.models:
            self._send(200, json.dumps({"data": [{"id": name, **self.recorder.card} for name in self.recorder.models]}))
        else:
            self._send(404, json.dumps({"error": {"message": f"no route {self.path}"}}))

    def do_POST(self) -> None:
        recorder = self.recorder
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if recorder.reads is not None:
            recorder.reads(self.headers.get("Content-Type", ""), raw)
        body = json.loads(raw) if recorder.reads is None else {}
        with recorder.lock:
            recorder.bodies.append(body)
            recorder.moments.append(time.perf_counter())
            recorder.keys.append(self.headers.get("Authorization"))
            recorder.headers.append({name.lower(): value for name, value in self.headers.items()})
            recorder.num_running += 1
            recorder.most_running = max(recorder.most_running, recorder.num_running)
        self.is_running = True
        try:
            self._answer(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            if self.is_running:
                recorder.has_left.set()
        finally:
            self._end()

    def _end(self) -> None:
        """Once a request: before its end mark is sent, as the client may send the next one as soon as it reads that."""
        if self.is_running:
            self.is_running = False
            with self.recorder.lock:
                self.recorder.num_running -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        name = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}.get(self.route, self.route[1:])
        if name not in self.recorder.answers:
            return self._send(404, json.dumps({"error": {"message": f"no route {self.path}", "code": 404}}))
        pieces = self.recorder.answers[name](body)
        try:
            first = next(pieces)
        except Refusal as refusal:
            return self._send(refusal.status, refusal.body, refusal.headers)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._write(first)
            for piece in pieces:
                self._write(piece)
        except Cut:
            self.close_connection = True
            return None
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _write(self, piece: bytes) -> None:
        if self.recorder.stop.is_set():
            raise Cut
        if piece.endswith(END):
            self._end()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    def _send(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        payload = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments: object) -> None:
        pass
