"""Round trips over a real socket, in the form in which TorchServe's front end writes them."""

from __future__ import annotations

import json
import socket
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from ts_parallel.serving.torchserve.front_end import FrontEnd, discard

with warnings.catch_warnings(action="ignore"):  # TorchServe's metrics leave a file open
    from ts.context import Context


def text(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("!i", len(raw)) + raw


END = struct.pack("!i", -1)


def job(name: str, body: Any, route: str = "v1/completions") -> bytes:
    headers = text("url_path") + text(route) + text("Host") + text("localhost") + END
    return text(name) + headers + text("body") + text("application/json") + text(json.dumps(body)) + END


def message(*jobs: bytes) -> bytes:
    return b"I" + b"".join(jobs) + END


class Worker:
    """A worker's side in a thread of its own: what a drain sees, and how it answers."""

    def __init__(self) -> None:
        self.front_end = FrontEnd()
        self.far, near = socket.socketpair()
        self.far.settimeout(10)
        self.context = Context("m", ".", {}, 1, None, "0")
        self.context.cl_socket = near
        self.context.request_ids, self.context.request_processor = {}, []

    def close(self) -> None:
        self.far.close()
        self.context.cl_socket.close()

    def exchange(self, sent: bytes, *bodies: str, parts: int = 1) -> list[dict[str, Any]]:
        """What the worker reads of `sent`, which comes in so many parts, after it has answered with `bodies`."""
        bodies = bodies or ("",) * len(self.context.request_ids)
        result: list[list[dict[str, Any]]] = []
        thread = threading.Thread(target=lambda: result.append(self.front_end.exchange(bodies, self.context)))
        thread.start()
        size = -(-len(sent) // parts)
        for begin in range(0, len(sent), size):
            self.far.sendall(sent[begin : begin + size])
            thread.join(0.01)
        thread.join(10)
        (data,) = result
        return data


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def test_jobs_are_what_torchserves_own_functions_make_of_them(worker: Worker) -> None:
    data = worker.exchange(message(job("a", {"prompt": "x"}), job("b", [1], "health")))
    assert data == [{"body": {"prompt": "x"}}, {"body": [1]}]
    assert worker.context.request_ids == {0: "a", 1: "b"}
    headers = [worker.context.get_all_request_header(index) for index in (0, 1)]
    assert [own["url_path"] for own in headers] == ["v1/completions", "health"]
    assert headers[0]["body"] == {"content-type": "application/json"}


@pytest.mark.parametrize("parts", [2, 7, 60])
def test_message_may_come_in_any_parts(worker: Worker, parts: int) -> None:
    sent = message(job("a", {"prompt": "é" * 200}), job("b", {"prompt": "y"}))
    assert worker.exchange(sent, parts=parts) == [{"body": {"prompt": "é" * 200}}, {"body": {"prompt": "y"}}]


def test_many_large_jobs_are_read_whole_in_any_parts(worker: Worker) -> None:
    prompts = [letter * 400_000 for letter in "abcdef"]
    sent = message(*(job(prompt[0], {"prompt": prompt}) for prompt in prompts))
    assert worker.exchange(sent, parts=20) == [{"body": {"prompt": prompt}} for prompt in prompts]
    assert worker.exchange(sent) == [{"body": {"prompt": prompt}} for prompt in prompts]
    assert worker.exchange(message(job("g", {"prompt": "x"})), parts=3) == [{"body": {"prompt": "x"}}]


def test_job_that_is_open_still_is_not_read_anew(worker: Worker) -> None:
    first = worker.exchange(message(job("a", {"prompt": "x"})))
    second = worker.exchange(message(job("b", {"prompt": "y"}), job("a", {"prompt": "x"})))
    assert second == [{"body": {"prompt": "y"}}, {"body": {"prompt": "x"}}]
    assert second[1] is first[0]
    assert worker.context.request_ids == {0: "b", 1: "a"}
    assert worker.exchange(message(job("b", {"prompt": "y"}))) == [{"body": {"prompt": "y"}}]
    assert worker.front_end._jobs.keys() == {b"b"}


def test_job_of_a_known_name_that_says_something_else_is_read(worker: Worker) -> None:
    worker.exchange(message(job("a", {"prompt": "x"})))
    assert worker.exchange(message(job("a", {"prompt": "longer"}))) == [{"body": {"prompt": "longer"}}]


def test_answers_of_one_round_trip_do_not_colour_the_next(worker: Worker) -> None:
    worker.exchange(message(job("a", {})))
    worker.context.set_response_status(429, "Too Many Requests", 0)
    worker.context.set_response_content_type(0, "text/event-stream")
    worker.context.stopping_criteria = {0: lambda _: False}
    worker.exchange(message(job("a", {})), "piece")
    reply = read_all(worker.far)
    assert struct.pack("!i", 429) in reply and text("ts_stream_next") + text("true") in reply
    assert reply.endswith(text("piece") + END)
    assert worker.context.get_response_status(0) == (200, None)
    assert worker.context.get_response_headers(0) == {}


def test_job_that_is_left_out_is_sent_nothing(worker: Worker) -> None:
    worker.exchange(message(job("a", {}), job("b", {})))
    read_all(worker.far)
    del worker.context.request_ids[0]
    worker.exchange(message(job("a", {}), job("b", {})), "", "news")
    reply = read_all(worker.far)
    assert text("b") in reply and text("a") not in reply


def read_all(connection: socket.socket) -> bytes:
    received = connection.recv(1 << 16)
    connection.setblocking(False)
    try:
        received += connection.recv(1 << 16)
    except BlockingIOError:
        pass
    finally:
        connection.settimeout(10)
    return received


def test_process_ends_as_torchserve_ends_it_where_the_front_end_is_gone(worker: Worker) -> None:
    worker.far.sendall(message(job("a", {}))[:9])
    worker.far.shutdown(socket.SHUT_WR)
    with pytest.raises(SystemExit) as ended:
        worker.front_end.exchange((), worker.context)
    assert ended.value.code == 0


def test_rank_that_follows_reads_until_the_front_end_is_gone(worker: Worker) -> None:
    worker.far.sendall(message(job("a", {})) * 50)
    worker.far.shutdown(socket.SHUT_WR)
    with pytest.raises(SystemExit):
        discard(worker.context.cl_socket)
