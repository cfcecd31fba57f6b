"""TorchServe's continuous batching as a drain: each `handle()` call takes what the engine has ready and comes back.

The front end sends all open jobs, waits for one reply, forwards it and asks again. So a call registers the jobs that
are new, drops those whose clients left, waits a moment for a token of any, and answers the jobs that have news. A job
without news is taken out of the reply, which keeps it open and leaves its status and headers free for later.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Generic, NoReturn, TypeVar

from ts_parallel.errors import AnswerTooLargeError, EngineError
from ts_parallel.serving.exchange import Door, OpenJob, RawRequest, Reply
from ts_parallel.serving.torchserve.draining import Draining
from ts_parallel.serving.torchserve.front_end import FrontEnd, exit_now
from ts_parallel.serving.torchserve.front_end_settings import DEFAULT_MESSAGE_SIZE
from ts_parallel.serving.torchserve.keep_open import ROUTE as KEEP_OPEN
from ts_parallel.serving.torchserve.transports.message_room import BYTES_OF_A_MESSAGE, Room, cut, num_bytes

logger = logging.getLogger(__name__)

# New requests join between two calls, so this bounds how long one of them waits while no token goes out.
SECONDS_PER_DRAIN = 0.04
# Who was answered often asks again. The front end tells of that in the next round trip, so one is made soon.
_SECONDS_TO_ASK_AGAIN = 0.004
# A request with this header wants to be known to have been left before its answer is whole. TorchServe looks whether a
# client is still there only when it is sent something, so such an answer begins with pieces of nothing.
MAY_LEAVE = "x-client-may-leave"
_SECONDS_BETWEEN_BEATS = 0.5
# A job that has ended may be named once more in the next call.
_NUM_ENDED_REMEMBERED = 4096


_REQUEST_ID = re.compile(r"[!-~]{1,128}")

D = TypeVar("D")


@dataclass
class _Beat:
    """When a job is next sent a piece of nothing, and whether it has been sent one."""

    due: float
    has_begun: bool = False


class OpenJobs(Generic[D]):
    """Owns the open jobs, whatever carries their replies.

    `open_job` turns a raw request into a running job, or into a reply that is ready at once.
    """

    _cuts_whole_answers = False
    """Whether one that is no stream may leave in several messages too."""

    def __init__(
        self,
        door: Door[D],
        open_job: Callable[[str, RawRequest], OpenJob[D] | Reply],
        most_bytes: int = DEFAULT_MESSAGE_SIZE,
    ) -> None:
        """
        Args:
            most_bytes: of a text that TorchServe takes. A stream's larger piece leaves in several, any other larger
                answer is refused.
        """
        self._door = door
        self._open_job = open_job
        self._most_bytes = most_bytes
        self._jobs: dict[str, OpenJob[D]] = {}
        self._ready: dict[str, Reply] = {}
        self._draining = Draining()

    def _register(self, request_id: str, request: RawRequest) -> None:
        if (error := self._draining.refusal_of(request.route)) is not None:
            self._ready[request_id] = Reply.refusal(error)
            return
        opened = self._open_job(request_id, request)
        if isinstance(opened, Reply):
            self._ready[request_id] = opened
        else:
            self._jobs[request_id] = opened

    def _collect(self, request_id: str) -> Reply | None:
        reply = self._ready.pop(request_id, None)
        if reply is None and request_id in self._jobs:
            reply = self._advance(request_id)
            if reply is not None and reply.is_last:
                self._forget(request_id)
        return None if reply is None else self._sendable(request_id, reply)

    def _sendable(self, request_id: str, reply: Reply) -> Reply:
        """What can be sent of a reply now; the rest is ready for the next message."""
        size, most_at_once = num_bytes(reply.body), min(self._most_bytes, BYTES_OF_A_MESSAGE)
        if size > self._most_bytes and not reply.is_stream:
            return Reply.refusal(AnswerTooLargeError(size, self._most_bytes))
        if size > most_at_once and (reply.is_stream or self._cuts_whole_answers):
            body, rest = cut(reply.body, most_at_once)
            self._ready[request_id] = replace(reply, body=rest, is_first=False)
            return replace(reply, body=body, is_last=False)
        return reply

    def _advance(self, request_id: str) -> Reply | None:
        job = self._jobs[request_id]
        try:
            return job.advance(self._door.router.take(request_id))
        except Exception as error:  # whatever it was, the other jobs must not end by it
            logger.exception("a request failed")
            return job.fail(EngineError(f"{type(error).__name__}: {error}"))

    def _forget(self, request_id: str) -> None:
        del self._jobs[request_id]
        self._door.abort(request_id)


class ContinuousBatchingDrain(OpenJobs[D]):
    """The jobs of `continuousBatching: true`. Where there are replicas (`keep_open`), one request to `keep_open.ROUTE`
    is never answered.

    A job that came by gRPC is answered in one piece. TorchServe 0.12 takes it for closed after its first
    (`GRPCJob.isOpen` says the opposite), and this process for dead where a piece does not say whether it is the last.
    """

    _cuts_whole_answers = True  # so that streams go on meanwhile

    def __init__(
        self,
        door: Door[D],
        open_job: Callable[[str, RawRequest], OpenJob[D] | Reply],
        has_replicas: bool = False,
        most_bytes: int = DEFAULT_MESSAGE_SIZE,
    ) -> None:
        super().__init__(door, open_job, most_bytes)
        self._has_replicas = has_replicas
        self._kept_open: str | None = None
        self._gathered: dict[str, bytearray] = {}  # what a job that came by gRPC has been answered so far
        self._beats: dict[str, _Beat] = {}  # of those jobs whose requests have `MAY_LEAVE`
        self._left_out: str | None = None  # who was first to find the last message full
        self._ended: deque[str] = deque(maxlen=_NUM_ENDED_REMEMBERED)
        self._has_ended = False  # since the last wait for news
        self._front_end = FrontEnd()

    def handle(self, data: list[dict[str, Any]], context: Any) -> NoReturn:
        """The first round trip and all that follow it, which go by TorchServe's loop: ends with this process alone."""
        try:
            while True:
                data = self._front_end.exchange(self.round_trip(data, context), context)
        except Exception:  # whose requests these are TorchServe's loop does not know: it must not answer them
            logger.exception("a round trip failed")
            exit_now()

    def round_trip(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """Take what there is for each job. `context` is TorchServe's; it is told of each one's status, type and end."""
        names: dict[int, str] = dict(context.request_ids)
        self._drop_all_but(set(names.values()))
        self._draining.tell(len(self._jobs))
        for index, request_id in names.items():
            if not self._knows(request_id):
                if is_grpc(context, index):
                    self._gathered[request_id] = bytearray()
                self._register(request_id, raw_request(data[index], context, index))
        context.stopping_criteria = {}
        bodies = [""] * len(data)
        if not self._ready and not self._has_news() and not self._is_beat_due():
            context.request_ids.clear()
            return bodies
        room = Room()
        for index, request_id in self._in_turn(names):
            if room.is_full:
                self._left_out = self._left_out or request_id
                reply = None
            else:
                reply = self._collect(request_id)
            if reply is None:
                del context.request_ids[index]
                continue
            room.take(reply.body)
            bodies[index] = reply.body
            announce(reply, context, index)
            context.stopping_criteria[index] = lambda _, ends=reply.stream_ends: ends
        self._draining.tell(len(self._jobs) + len(self._ready))
        return bodies

    def _drop_all_but(self, names: set[str]) -> None:
        """The others' clients have left."""
        for request_id in (self._jobs.keys() | self._ready.keys()) - names:
            self._ready.pop(request_id, None)
            self._gathered.pop(request_id, None)
            self._beats.pop(request_id, None)
            if request_id in self._jobs:
                self._forget(request_id)
        if self._kept_open not in names:
            self._kept_open = None

    def _knows(self, request_id: str) -> bool:
        is_open = request_id in self._jobs or request_id in self._ready
        return is_open or request_id in self._ended or request_id == self._kept_open

    def _in_turn(self, names: dict[int, str]) -> list[tuple[int, str]]:
        """All jobs, beginning with the first for which the last message had no room."""
        order, (left_out, self._left_out) = list(names.items()), (self._left_out, None)
        at = next((at for at, (_, request_id) in enumerate(order) if request_id == left_out), 0) if left_out else 0
        return order[at:] + order[:at]

    def _has_news(self) -> bool:
        if not self._jobs and not self._kept_open:
            return False
        seconds = _SECONDS_TO_ASK_AGAIN if self._has_ended else SECONDS_PER_DRAIN
        self._has_ended = False
        return self._door.router.wait(seconds)

    def _register(self, request_id: str, request: RawRequest) -> None:
        if self._has_replicas and request.route == KEEP_OPEN:
            if self._kept_open is None:
                self._kept_open = request_id
            else:
                self._ready[request_id] = Reply.whole("{}")
            return
        super()._register(request_id, request)
        if MAY_LEAVE in request.headers and request_id in self._jobs:
            self._beats[request_id] = _Beat(time.monotonic() + _SECONDS_BETWEEN_BEATS)

    def _collect(self, request_id: str) -> Reply | None:
        reply = super()._collect(request_id)
        if reply is not None and request_id in self._gathered:
            reply = self._gather(request_id, reply)
        if (beat := self._beats.get(request_id)) is not None:
            reply = self._after_beats(request_id, beat, reply)
        if reply is not None and reply.is_last:
            self._beats.pop(request_id, None)
            self._ended.append(request_id)
            self._has_ended = True
        return reply

    def _is_beat_due(self) -> bool:
        now = time.monotonic()
        due = (self._jobs.get(name) for name, beat in self._beats.items() if beat.due <= now)
        return any(job is not None and job.is_whole for job in due)

    def _after_beats(self, request_id: str, beat: _Beat, reply: Reply | None) -> Reply | None:
        """What a job is sent that may have begun already: an error's status then stands in its body alone."""
        if reply is not None:
            return replace(reply, is_first=False) if beat.has_begun else reply
        if time.monotonic() < beat.due or not self._jobs[request_id].is_whole:
            return None
        is_first, beat.has_begun = not beat.has_begun, True
        beat.due = time.monotonic() + _SECONDS_BETWEEN_BEATS
        return Reply("", is_first, is_last=False)

    def _gather(self, request_id: str, reply: Reply) -> Reply | None:
        """The one reply of a job that came by gRPC, once it is whole, or is more than can be sent."""
        gathered = self._gathered[request_id]
        gathered += reply.body.encode()
        if len(gathered) > self._most_bytes:
            self._ready.pop(request_id, None)
            if request_id in self._jobs:
                self._forget(request_id)
            reply = Reply.refusal(AnswerTooLargeError(len(gathered), self._most_bytes))
        elif reply.is_last:
            reply = replace(reply, body=gathered.decode())
        else:
            return None
        del self._gathered[request_id]
        # Not the first, though it is: so that it says that it is the last.
        return replace(reply, is_first=False)


def announce(reply: Reply, context: Any, index: int) -> None:
    """Tell TorchServe's context of a reply's status, type and headers.

    A client's own `X-Request-Id` comes back under another name: TorchServe 0.12 puts one of its own there.
    """
    context.set_response_status(reply.status, HTTPStatus(reply.status).phrase, index)
    context.set_response_content_type(index, reply.content_type)
    if not reply.is_first:
        return
    for name, value in reply.headers.items():
        context.set_response_header(index, name, value)
    if (own := headers_of(context, index).get("x-request-id")) and _REQUEST_ID.fullmatch(own):
        context.set_response_header(index, "X-Client-Request-Id", own)


def raw_request(data: dict[str, Any], context: Any, index: int) -> RawRequest:
    """One element of TorchServe's `data`, with what its headers say; by gRPC an input `url_path` is the route, and
    `authorization` stands for that header."""
    body = data.get("body", data.get("data"))
    if is_grpc(context, index):
        texts = {name: bytes(data.get(name, b"")).decode(errors="replace") for name in ("url_path", "authorization")}
        return RawRequest(texts["url_path"].strip("/"), body, "", {"authorization": texts["authorization"]})
    headers = headers_of(context, index)
    content_type = headers.get("content-type", "")
    if "multipart/form-data" in content_type:  # TorchServe has taken it apart: bytes by the names of its parts
        body = {name: value for name, value in data.items() if name != "url_path"}
    return RawRequest(headers.get("url_path", "").strip("/"), body, content_type, headers)


def headers_of(context: Any, index: int) -> dict[str, str]:
    """A request's, their names in small letters."""
    return {str(name).lower(): str(value) for name, value in context.get_all_request_header(index).items()}


def end_grpc(context: Any, index: int) -> None:
    """Where an answer that is no stream goes to gRPC, say that it is the last. TorchServe 0.12 takes this process for
    dead otherwise; of HTTP's it must not be said."""
    if is_grpc(context, index):
        context.set_response_header(index, "ts_stream_next", "false")


def is_grpc(context: Any, index: int) -> bool:
    """Whether a request came by gRPC: it has no headers then, but one entry for each input."""
    return not any(isinstance(value, str) for value in context.get_all_request_header(index).values())
