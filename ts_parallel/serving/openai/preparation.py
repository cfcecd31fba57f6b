"""Requests on their way into the engine: what is soon done is done at once, all else in threads beside the streams.

A large body is parsed and tokenized, and a form compiled, while the round trips with the front end go on. Its job is
open meanwhile: it can be aborted, and the first thing it says may be a refusal. What is short is prepared by whoever
brings it, so it overtakes what takes long, and among themselves both keep their order.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ts_parallel.engine.engine import EngineThread
from ts_parallel.engine.router import Delivery
from ts_parallel.errors import RequestError
from ts_parallel.serving.exchange import RawRequest, Reply
from ts_parallel.serving.openai.choices import GenerationJob, error_of
from ts_parallel.serving.openai.templates.sandbox import TakesLongError

logger = logging.getLogger(__name__)

_NUM_THREADS = 2
_MOST_BYTES_AT_ONCE = 16384  # which are tokens in about 5 ms
# Fields whose value may be long to compile.
_FORMS = (
    "response_format",
    "structured_outputs",
    "tools",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)

Opened = GenerationJob | Reply


class PreparedJob:
    """A job that may not have begun."""

    def __init__(self) -> None:
        self._opened: Opened | None = None
        self._is_ready = threading.Event()

    def begin(self, opened: Opened) -> None:
        """Called once, by the thread that has prepared it."""
        self._opened = opened
        self._is_ready.set()

    def advance(self, delivery: Delivery) -> Reply | None:
        if delivery.token_ids or delivery.finish_reason is not None:
            self._is_ready.wait()  # its requests are with the engine already, so it is about to be
        if isinstance(self._opened, Reply):
            return self._opened
        if self._opened is not None:
            return self._opened.advance(delivery)
        return None if delivery.error is None else Reply.refusal(error_of(delivery))

    @property
    def is_whole(self) -> bool:
        return isinstance(self._opened, GenerationJob) and self._opened.is_whole

    def fail(self, error: RequestError) -> Reply:
        return self._opened.fail(error) if isinstance(self._opened, GenerationJob) else Reply.refusal(error)


class Preparations:
    """Owns the threads in which requests are prepared. `open_now` makes a job or a reply of one, and raises
    nothing but `TakesLongError`, by which it asks to be called in one of them."""

    def __init__(
        self,
        engine: EngineThread,
        open_now: Callable[[str, RawRequest], Opened],
        renders_long: Callable[[RawRequest], bool] = lambda request: False,
    ) -> None:
        """
        Args:
            renders_long: whether the prompt of a request may take long to be made, however short it is.
        """
        self._engine = engine
        self._open_now = open_now
        self._renders_long = renders_long
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "prepare")

    def open(self, request_id: str, request: RawRequest) -> Opened | PreparedJob:
        self._engine.reserve(request_id)
        if takes_long(request) or self._renders_long(request):
            return self._open_later(request_id, request)
        try:
            opened = self._open_now(request_id, request)
        except TakesLongError:
            return self._open_later(request_id, request)
        if isinstance(opened, Reply):
            self._engine.router.close(request_id)
        return opened

    def _open_later(self, request_id: str, request: RawRequest) -> PreparedJob:
        job = PreparedJob()
        self._threads.submit(self._prepare, request_id, request, job)
        return job

    def _prepare(self, request_id: str, request: RawRequest, job: PreparedJob) -> None:
        if not self._engine.router.is_open(request_id):  # its client has left while it waited for a thread
            return
        try:
            opened = self._open_now(request_id, request)
        except TakesLongError:  # from now on it is known, and has its time
            opened = self._open_now(request_id, request)
        job.begin(opened)
        if isinstance(opened, Reply):
            self._engine.router.tell(request_id)


def takes_long(request: RawRequest) -> bool:
    """Whether others would notice that it is prepared."""
    body = request.body
    if isinstance(body, (bytes, bytearray)):
        return len(body) > _MOST_BYTES_AT_ONCE or any(name.encode() in body for name in _FORMS)
    if isinstance(body, str):
        return len(body) > _MOST_BYTES_AT_ONCE or any(name in body for name in _FORMS)
    return isinstance(body, dict) and (any(name in body for name in _FORMS) or _is_large(body))


def _is_large(body: object) -> bool:
    """Whether a parsed body has more letters and numbers than are prepared at once."""
    left, parts = _MOST_BYTES_AT_ONCE, [body]
    while parts and left >= 0:
        part = parts.pop()
        if isinstance(part, str):
            left -= len(part)
        elif isinstance(part, (list, dict)):
            left -= len(part)
            parts += part[: left + 1] if isinstance(part, list) else list(part.values())
    return left < 0
