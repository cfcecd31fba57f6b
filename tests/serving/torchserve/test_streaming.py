"""A handler of a user's own that answers in pieces, over the transports that model-config.yaml may choose."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deployment import (
    DEMO_MODEL,
    MODEL_CONFIGS,
    ask_at_once,
    is_healthy,
    log_end,
    on_the_cpu,
    served,
    starting,
    wait_until,
)
from grpc_client import predictions_request, send
from http_client import get, post, stream

from ts_parallel.cli.server.torchserve import TorchServe
from ts_parallel.errors import ConfigError, RequestError
from ts_parallel.serving.exchange import RawRequest
from ts_parallel.serving.torchserve.streaming import ResponseStream, StreamingHandler, make_transport

HANDLER = """
import time

from ts_parallel.errors import RequestError
from ts_parallel.serving.torchserve.streaming import StreamingHandler


class Countdown(StreamingHandler):
    def load(self, context):
        self.name = context.model_name

    def answer(self, request, stream):
        first = request.fields().get("from")
        if not isinstance(first, int):
            raise RequestError("'from' must be a number", "from")
        for number in range(first, 0, -1):
            stream.send(f"{self.name} {number}\\n")
            time.sleep(0.1)
            if not stream.is_wanted:
                print("nobody listens any more", flush=True)
                return
            if number == 13:
                raise RuntimeError("bad luck")


_handler = Countdown()


def handle(data, context):
    return _handler.handle(data, context)
"""
SETTINGS = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 8, "maxBatchDelay": 50, "deviceType": "cpu", "handler": {}}


@pytest.fixture(scope="module", params=["continuous batching", "plain"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    workspace = tmp_path_factory.mktemp("streaming")
    (workspace / "countdown.py").write_text(HANDLER)
    (workspace / "files").mkdir()
    (workspace / "files" / "README").write_text("torch-model-archiver wants a file")
    settings = {**SETTINGS, "continuousBatching": request.param == "continuous batching"}
    with starting(workspace, settings, workspace / "files", workspace / "countdown.py") as server:
        wait_until(lambda: is_healthy(server), lambda: log_end(server))
        assert get(f"{server.url}/1.0/health") == (200, '{"status": "ok"}')
        yield server


def lines(first: int) -> str:
    return "".join(f"demo {number}\n" for number in range(first, 0, -1))


@pytest.mark.torchserve
def test_pieces_come_while_the_handler_is_at_work(server: TorchServe) -> None:
    moments, pieces = zip(*stream(server.url, {"from": 5}), strict=True)
    assert "".join(pieces) == lines(5)
    assert len(pieces) >= 3
    assert moments[-1] - moments[0] > 0.15


@pytest.mark.torchserve
def test_requests_at_once_each_get_their_own_pieces(server: TorchServe) -> None:
    answers: dict[int, tuple[int, str]] = {}

    def ask(first: int) -> None:
        answers[first] = post(server.url, {"from": first})

    threads = [threading.Thread(target=ask, args=(first,)) for first in (1, 3, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {first: (200, lines(first)) for first in (1, 3, 6)}


@pytest.mark.torchserve
def test_request_is_refused_alone_and_another_ends_with_its_error(server: TorchServe) -> None:
    refused: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: refused.append(post(server.url, {"from": "x"})))
    thread.start()
    status, text = post(server.url, {"from": 13})
    thread.join()
    assert refused[0][0] == 400
    assert json.loads(refused[0][1])["error"]["param"] == "from"
    piece, error = text.split("\n")
    assert (status, piece) == (200, "demo 13")
    assert json.loads(error)["error"]["message"] == "RuntimeError: bad luck"


@pytest.mark.torchserve
def test_grpc_is_answered_in_pieces_where_torchserve_can(server: TorchServe, request: pytest.FixtureRequest) -> None:
    assert server.grpc_port is not None
    pieces = list(send(server.grpc_port, predictions_request("demo", {"data": b'{"from": 4}'})))
    assert "".join(pieces) == lines(4)
    assert (len(pieces) > 1) == ("plain" in request.node.name)
    (refusal,) = send(server.grpc_port, predictions_request("demo", {"data": b'{"from": "x"}'}))
    assert json.loads(refusal)["error"]["status"] == 400
    assert is_healthy(server)
    assert "Worker died" not in server.log_text()


@pytest.mark.torchserve
def test_client_that_leaves_harms_nobody_and_the_handler_hears_of_it_where_torchserve_tells(
    server: TorchServe, request: pytest.FixtureRequest
) -> None:
    leaving = stream(server.url, {"from": 12})
    next(leaving)
    leaving.close()  # type: ignore[attr-defined]
    assert post(server.url, {"from": 3}) == (200, lines(3))
    if "continuous" in request.node.name:
        wait_until(lambda: "nobody listens any more" in server.log_text(), lambda: log_end(server), 20)


@pytest.mark.torchserve
def test_text_generation_streams_without_continuous_batching_too(tmp_path: Path) -> None:
    settings = on_the_cpu(MODEL_CONFIGS["tp2-cpu.yaml"]) | {"continuousBatching": False, "maxBatchDelay": 200}
    with served(tmp_path, settings, DEMO_MODEL) as server:
        body = {"prompt": "Return a new list containing", "max_tokens": 24, "ignore_eos": True}
        pieces = [piece for _, piece in stream(server.url, body)]
        assert len(pieces) > 1
        bodies = [{**body, "stream": False}, {**body, "max_tokens": "x"}, {**body, "stream": False, "max_tokens": 3}]
        (long, answer), (refused, _), (short, _) = ask_at_once(server, bodies)
    assert (long, refused, short) == (200, 400, 200)
    assert answer["text"] == "".join(pieces)


class Context:
    """TorchServe's context of one batch without continuous batching."""

    def __init__(self, *request_ids: str) -> None:
        self.request_ids = dict(enumerate(request_ids))
        self.model_yaml_config: dict[str, Any] = {}
        self.statuses: dict[int, int] = {}
        self.content_types: dict[int, str] = {}

    def get_all_request_header(self, index: int) -> dict[str, str]:
        return {"Host": "localhost"}

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.statuses[index] = code

    def set_response_content_type(self, index: int, value: str) -> None:
        self.content_types[index] = value


class Letters(StreamingHandler):
    """Sends a word letter by letter, each of them once the last was taken."""

    def answer(self, request: RawRequest, stream: ResponseStream) -> None:
        if request.body == "bad":
            raise RequestError("a bad word")
        stream.content_type = "text/x-letters"
        for letter in request.body:
            stream.send(letter)
            while stream.has_news():
                time.sleep(0.001)


def test_plain_batch_sends_pieces_to_those_that_have_news_and_ends_all_at_once(
    sent_pieces: list[tuple[dict[int, str], dict[int, str]]],
) -> None:
    handler, context = Letters(), Context("a", "b", "c")
    handler.handle(None, context)
    ends = handler.handle([{"body": "xyz"}, {"body": "bad"}, {"body": "q"}], context)
    assert all(pieces.keys() == names.keys() and all(pieces.values()) for pieces, names in sent_pieces)
    assert all(names.items() <= {0: "a", 2: "c"}.items() for _, names in sent_pieces)
    texts = ["".join(pieces.get(index, "") for pieces, _ in sent_pieces) + ends[index] for index in (0, 2)]
    assert texts == ["xyz", "q"]
    assert context.statuses == {0: 200, 1: 400, 2: 200}
    assert json.loads(ends[1])["error"]["message"] == "a bad word"
    assert context.content_types[0] == "text/x-letters"
    assert not handler.streams._open


def test_transport_that_loses_requests_is_refused_with_the_reason() -> None:
    handler = Letters()
    with pytest.raises(ConfigError, match=r"'asyncCommunication': TorchServe 0\.12 never answers"):
        make_transport({"asyncCommunication": True, "parallelType": "custom"}, handler.streams, handler._open)


def test_client_that_left_while_it_waited_for_a_thread_is_not_answered() -> None:
    begun, go_on = threading.Event(), threading.Event()
    answered = []

    class Slow(StreamingHandler):
        def answer(self, request: RawRequest, stream: ResponseStream) -> None:
            answered.append(request.route)
            begun.set()
            assert go_on.wait(10)
            stream.send("late")

    handler = Slow(num_threads=1)
    for name in ("first", "second", "third"):
        handler._open(name, RawRequest(name, b"", ""))
    assert begun.wait(10)
    first, second = handler.streams._open["first"], "second"
    handler.streams.abort("first")
    handler.streams.abort(second)
    go_on.set()
    assert handler.streams.wait(10)
    assert handler.streams.take("third").pieces == ["late"]
    assert answered == ["first", "third"]
    assert first.take().pieces == []  # nobody would ever take it
