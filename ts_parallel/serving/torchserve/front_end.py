"""The connection to TorchServe's front end, where a handler reads and writes it itself.

TorchServe's own loop reads every job anew in each round trip, field by field, with a system call for each; with every
call the thread lets the interpreter go and has to win it back from the engine's. It prints two lines a round trip too,
which the front end parses. Between two steps of a model there is no time for that. Here one call reads what has come,
and a job that is the same as last time, as most are, is compared and not parsed.

The messages are those of `ts/protocol/otf_message_handler.py` of TorchServe 0.12.0: `I`, then for each job its id, its
headers and its inputs, and -1 at the end of each list; a text is its length, in four bytes, and its bytes.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

_PREDICT = b"I"
_END_OF_LIST = struct.pack("!i", -1)
_TEXTS_OF_A_HEADER, _TEXTS_OF_AN_INPUT = 2, 3
_BYTES_A_READ = 1 << 20


@dataclass(frozen=True)
class _Job:
    """What a job is in each round trip in which it is open: its bytes, and TorchServe's reading of them."""

    message: bytes
    name: str
    data: dict[str, Any]
    properties: dict[str, Any]


class _Incomplete(Exception):
    """More of the message is to come."""


class FrontEnd:
    """Owns what has come and was not answered yet, and the jobs of the last round trip."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._at = len(_PREDICT)  # where the first job begins that has not come to its end
        self._read: dict[bytes, _Job] = {}  # the jobs before it, by the bytes of their names
        self._last_message = b""
        self._jobs: dict[bytes, _Job] = {}

    def exchange(self, bodies: Sequence[str], context: Any) -> list[dict[str, Any]]:
        """Answer a round trip, as `handle()` would by returning `bodies`, and wait for the next one.

        Returns: the next one's `data`; `context` tells of the next one too.
        """
        # Not above: to import anything of TorchServe's leaves a file open, which only its own workers can bear.
        from ts.context import RequestProcessor
        from ts.protocol.otf_message_handler import create_predict_response

        reply = create_predict_response(bodies, context.request_ids, "Prediction success", 200, context=context)
        context.cl_socket.sendall(reply)
        jobs = self._next(context.cl_socket)
        context.request_ids = {index: job.name for index, job in enumerate(jobs)}
        context.request_processor = [RequestProcessor(job.properties) for job in jobs]
        return [job.data for job in jobs]

    def _next(self, connection: Any) -> list[_Job]:
        while True:
            try:
                return self._parse()
            except _Incomplete:
                self._received += receive(connection)

    def _parse(self) -> list[_Job]:
        """The jobs of the one message that has come.

        Raises:
            _Incomplete: it has not come to its end.
        """
        received = self._received
        if received and received == self._last_message:  # nobody has come or gone
            received.clear()
            self._at, self._read = len(_PREDICT), {}
            return list(self._jobs.values())
        assert received.startswith(_PREDICT) or not received, received[:1]
        while (end_of_name := _end_of_text(received, self._at)) is not None:
            at = self._at
            name = bytes(received[at + len(_END_OF_LIST) : end_of_name])
            job = self._jobs.get(name)
            if job is None or not received.startswith(job.message, at):
                end = _end_of_list(received, end_of_name, _TEXTS_OF_A_HEADER)
                end = _end_of_list(received, end, _TEXTS_OF_AN_INPUT)
                job = _read_job(bytes(received[at:end]))
            self._read[name] = job
            self._at += len(job.message)
        end = self._at + len(_END_OF_LIST)
        assert len(received) == end, "the front end waits for an answer before it asks again"
        self._last_message, self._jobs = bytes(received), self._read
        received.clear()
        self._at, self._read = len(_PREDICT), {}
        return list(self._jobs.values())


def discard(connection: Any) -> NoReturn:
    """Read what nobody wants to know, until there is no front end any more."""
    while True:
        receive(connection)


def receive(connection: Any) -> bytes:
    """What has come, once something has; ends this process as TorchServe does where the front end is gone."""
    received: bytes = connection.recv(_BYTES_A_READ)
    if not received:
        logger.info("Frontend disconnected.")
        sys.exit(0)
    return received


def exit_now() -> NoReturn:
    """End this worker where another rank may be dead: TorchServe answers its open requests, and starts another.

    A reply must not be sent any more. TorchServe gives a worker up as soon as one rank's socket closes; a reply of
    another rank that comes then stays in its queue, is taken for the next worker's answer to LOAD, and from there on
    each request gets the answer to the one before (WorkerThread of TorchServe 0.12.0).
    """
    with suppress(OSError):  # nobody may read it any more
        sys.stdout.flush()
    os._exit(1)


def _end_of_text(received: bytearray, at: int) -> int | None:
    """Where the text at a place ends; None at the end of a list."""
    begin = at + len(_END_OF_LIST)
    if len(received) < begin:
        raise _Incomplete
    length: int = struct.unpack_from("!i", received, at)[0]
    if length < 0:
        return None
    if len(received) < begin + length:
        raise _Incomplete
    return begin + length


def _end_of_list(received: bytearray, at: int, num_texts: int) -> int:
    """Where a list ends whose elements are so many texts each."""
    while (end := _end_of_text(received, at)) is not None:
        at = end
        for _ in range(num_texts - 1):
            end = _end_of_text(received, at)
            assert end is not None
            at = end
    return at + len(_END_OF_LIST)


def _read_job(message: bytes) -> _Job:
    """By TorchServe's own functions."""
    from ts.protocol.otf_message_handler import retrieve_msg
    from ts.service import Service

    _, requests = retrieve_msg(_Bytes(_PREDICT + message + _END_OF_LIST))
    (processor,), (data,), names = Service.retrieve_data_for_inference(requests)
    return _Job(message, names[0], data, processor.get_request_properties())


class _Bytes:
    """A connection on which everything has come."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def recv(self, length: int) -> bytes:
        begin, self._at = self._at, self._at + length
        return self._content[begin : self._at]
