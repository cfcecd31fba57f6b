"""TorchServe without continuous batching: one `handle()` call answers a batch, and sends pieces meanwhile.

A piece is a message of its own that names the jobs it is for. Only the last message, which the call returns, ends any:
whoever is done before the slowest of the batch waits for its end until then, and nobody hears of clients that left.
What the last message has no room for is sent before it, as a piece that is all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from ts_parallel.serving.exchange import Door, OpenJob, RawRequest, Reply
from ts_parallel.serving.torchserve.front_end_settings import DEFAULT_MESSAGE_SIZE
from ts_parallel.serving.torchserve.transports.continuous_batching import (
    SECONDS_PER_DRAIN,
    OpenJobs,
    announce,
    end_grpc,
    is_grpc,
    raw_request,
)
from ts_parallel.serving.torchserve.transports.message_room import Room

D = TypeVar("D")


class PlainBatches(OpenJobs[D]):
    """The jobs of one `handle()` call."""

    def __init__(
        self,
        door: Door[D],
        open_job: Callable[[str, RawRequest], OpenJob[D] | Reply],
        begin: Callable[[], Future[None]] | None = None,
        most_bytes: int = DEFAULT_MESSAGE_SIZE,
    ) -> None:
        """
        Args:
            begin: called once all jobs of a batch are open; starts the work for them, where that is done together.
        """
        super().__init__(door, open_job, most_bytes)
        self._begin = begin

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """Returns once all jobs have ended.

        Raises:
            BaseException: what the work that `begin` started has raised.
        """
        try:
            return self._answer(data, context)
        finally:
            for request_id in list(self._jobs):  # none, unless something was raised
                self._forget(request_id)
            self._ready.clear()
            self._draining.tell(0)

    def _answer(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        waiting: dict[int, str] = dict(context.request_ids)
        for index, request_id in waiting.items():
            self._register(request_id, raw_request(data[index], context, index))
        work = self._begin() if self._begin is not None else None
        begun: set[int] = set()
        ends, room = [""] * len(data), Room()
        while waiting:
            if work is not None and work.done():
                work.result()
            self._draining.tell(len(waiting))
            if not self._ready:
                self._door.router.wait(SECONDS_PER_DRAIN)
            pieces: dict[int, str] = {}
            for index, reply in self._replies(waiting):
                if index not in begun:
                    announce(reply, context, index)
                    begun.add(index)
                if reply.is_last:
                    del waiting[index]
                    if reply.is_first:
                        end_grpc(context, index)
                if reply.is_last and (not room.is_full or is_grpc(context, index)):  # gRPC may be promised one message
                    ends[index] = reply.body
                    room.take(reply.body)
                else:
                    pieces[index] = reply.body
            for message in _messages(pieces):
                self._send(message, context)
        return ends

    def _replies(self, waiting: dict[int, str]) -> list[tuple[int, Reply]]:
        replies = [(index, self._collect(request_id)) for index, request_id in waiting.items()]
        return [(index, reply) for index, reply in replies if reply is not None]

    def _send(self, pieces: dict[int, str], context: Any) -> None:
        # Not above: to import anything of TorchServe's leaves a file open, which only its own workers can bear.
        from ts.handler_utils.utils import send_intermediate_predict_response

        names = {index: context.request_ids[index] for index in pieces}
        send_intermediate_predict_response(pieces, names, "Intermediate Prediction success", 200, context)


def _messages(pieces: dict[int, str]) -> Iterator[dict[int, str]]:
    """The pieces of as many messages as have room for them."""
    message, room = {}, Room()
    for index, piece in pieces.items():
        message[index] = piece
        room.take(piece)
        if room.is_full:
            yield message
            message, room = {}, Room()
    if message:
        yield message
