"""Answers and requests of more bytes than TorchServe takes: each is refused alone, over both transports."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from deployment import DEMO_MODEL, is_healthy, log_end, starting, wait_until
from grpc_client import predictions_request, send
from http_client import JSON, events, post, stream

from ts_parallel.cli.server.archive import handler_config
from ts_parallel.cli.server.serve import running
from ts_parallel.cli.server.torchserve import TorchServe, free_ports

pytestmark = pytest.mark.torchserve

LIMIT = 100_000
HANDLER = """
import time

from ts_parallel.serving.torchserve.streaming import StreamingHandler


class Sizes(StreamingHandler):
    def answer(self, request, stream):
        if isinstance(request.body, (bytes, bytearray)) and not request.body.startswith(b"{"):
            return stream.end(str(len(request.body)))
        fields = request.fields()
        if "size" in fields:
            return stream.end("x" * fields["size"])
        for number in range(fields["pieces"]):
            stream.send(str(number % 10) + fields["each"] * "é")
            time.sleep(fields.get("pause", 0))


_handler = Sizes()


def handle(data, context):
    return _handler.handle(data, context)
"""
BYTES = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module", params=["continuous batching", "plain"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """Answers with as many bytes as it is asked for, or says how many it was sent."""
    workspace = tmp_path_factory.mktemp("sizes")
    (workspace / "sizes.py").write_text(HANDLER)
    (workspace / "files").mkdir()
    (workspace / "files" / "README").write_text("torch-model-archiver wants a file")
    is_continuous = request.param == "continuous batching"
    settings = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 32, "maxBatchDelay": 200, "deviceType": "cpu"}
    settings |= {"continuousBatching": is_continuous, "handler": {}}
    sizes = {"max_request_size": LIMIT, "max_response_size": LIMIT}
    with starting(workspace, settings, workspace / "files", workspace / "sizes.py", **sizes) as server:
        wait_until(lambda: is_healthy(server), lambda: log_end(server))
        yield server


@contextmanager
def beside_a_stream(server: TorchServe) -> Iterator[None]:
    """What happens meanwhile leaves a stream whole that has begun, and the worker alive."""
    num_deaths = server.log_text().count("Worker died")
    pieces: list[str] = []
    has_begun = threading.Event()

    def read() -> None:
        for _, piece in stream(server.url, {"pieces": 20, "each": 2, "pause": 0.1}):
            pieces.append(piece)
            has_begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert has_begun.wait(30)
        yield
    finally:
        thread.join()
    assert "".join(pieces) == "".join(f"{number % 10}éé" for number in range(20))
    assert server.log_text().count("Worker died") == num_deaths


def refusal(answer: tuple[int, str]) -> str:
    status, text = answer
    assert status == json.loads(text)["error"]["status"] == 413
    message: str = json.loads(text)["error"]["message"]
    return message


def test_answer_that_is_too_large_is_refused_alone(server: TorchServe) -> None:
    with beside_a_stream(server), ThreadPoolExecutor(4) as threads:
        sizes = [LIMIT + 1, 3, 20 * LIMIT, LIMIT]
        answers = list(threads.map(lambda size: post(server.url, {"size": size}), sizes))
    message = refusal(answers[0])
    for named in (str(LIMIT + 1), str(LIMIT), "max_response_size", "--max-response-size"):
        assert named in message
    assert str(20 * LIMIT) in refusal(answers[2])
    assert [answers[1], answers[3]] == [(200, "xxx"), (200, LIMIT * "x")]


def test_stream_of_larger_pieces_arrives_whole(server: TorchServe) -> None:
    with beside_a_stream(server):
        status, text = post(server.url, {"pieces": 3, "each": 2 * LIMIT})
    assert status == 200
    assert text == "".join(f"{number}" + 2 * LIMIT * "é" for number in range(3))


def test_answers_that_are_more_than_a_message_together_all_arrive(server: TorchServe) -> None:
    with beside_a_stream(server), ThreadPoolExecutor(28) as threads:
        streams = threads.map(lambda _: post(server.url, {"pieces": 4, "each": LIMIT // 2}), range(4))
        wholes = threads.map(lambda _: post(server.url, {"size": LIMIT}), range(24))
    assert list(wholes) == 24 * [(200, LIMIT * "x")]
    assert list(streams) == 4 * [(200, "".join(f"{number}" + LIMIT // 2 * "é" for number in range(4)))]


def test_request_that_is_too_large_is_refused_by_torchserve_alone(server: TorchServe) -> None:
    with beside_a_stream(server), ThreadPoolExecutor(3) as threads:
        bodies = [(LIMIT + 1) * b"y", LIMIT * b"y", 20 * LIMIT * b"y"]
        answers = list(threads.map(lambda body: post(server.url, body, BYTES), bodies))
    assert [status for status, _ in answers] == [413, 200, 413]
    assert answers[1][1] == str(LIMIT)


def test_requests_that_are_more_than_the_limit_together_are_all_answered(server: TorchServe) -> None:
    with beside_a_stream(server), ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(lambda size: post(server.url, (LIMIT - size) * b"y", BYTES), range(24)))
    assert answers == [(200, str(LIMIT - size)) for size in range(24)]


def test_grpc_answer_that_is_too_large_is_refused_alone(server: TorchServe) -> None:
    assert server.grpc_port is not None
    with beside_a_stream(server):
        (whole,) = send(server.grpc_port, predictions_request("demo", {"data": b'{"size": %d}' % (LIMIT + 1)}))
        assert json.loads(whole)["error"]["status"] == 413
        (fits,) = send(server.grpc_port, predictions_request("demo", {"data": b'{"size": %d}' % LIMIT}))
        assert fits == LIMIT * "x"
        with pytest.raises(grpc.RpcError):
            list(send(server.grpc_port, predictions_request("demo", {"data": LIMIT * b"y"})))


def test_grpc_stream_is_cut_where_torchserve_can_and_refused_elsewhere(
    server: TorchServe, request: pytest.FixtureRequest
) -> None:
    assert server.grpc_port is not None
    body = json.dumps({"pieces": 3, "each": LIMIT}).encode()
    with beside_a_stream(server):
        pieces = list(send(server.grpc_port, predictions_request("demo", {"data": body})))
    if "plain" in request.node.name:
        assert "".join(pieces) == "".join(f"{number}" + LIMIT * "é" for number in range(3))
    else:
        assert json.loads("".join(pieces))["error"]["status"] == 413


@pytest.fixture(scope="module")
def model_server() -> Iterator[TorchServe]:
    """One thread, so that a step takes as long as ever where other processes have the cores."""
    config = handler_config(DEMO_MODEL, "cpu", dtype="float32", kv_cache_memory="64MiB", num_threads=1)
    with running(
        config,
        DEMO_MODEL,
        "demo",
        "127.0.0.1",
        free_ports(1)[0],
        False,
        threading.Event(),
        max_request_size=LIMIT,
        max_response_size=LIMIT,
    ) as server:
        yield server


@contextmanager
def beside_an_answer(server: TorchServe) -> Iterator[None]:
    body = {"prompt": "Return a new list", "max_tokens": 120, "ignore_eos": True}
    expected = json.loads(post(server.url, {**body, "stream": False})[1])["text"]
    pieces = stream(server.url, body)
    begin = next(pieces)[1]
    yield
    assert begin + "".join(piece for _, piece in pieces) == expected
    assert "Worker died" not in server.log_text()


def test_tokens_of_a_text_that_are_too_many_bytes_are_refused(model_server: TorchServe) -> None:
    with beside_an_answer(model_server):
        answer = post(f"{model_server.url}/1.0/tokenize", {"prompt": "word " * (LIMIT // 5 - 100)})
    assert "max_response_size" in refusal(answer)


def test_choices_with_many_logprobs_are_refused_whole_and_arrive_as_a_stream(model_server: TorchServe) -> None:
    body: dict[str, Any] = {"prompt": "Return a new list", "temperature": 0, "max_tokens": 60, "ignore_eos": True}
    body |= {"n": 4, "logprobs": 20}
    with beside_an_answer(model_server):
        refused = post(f"{model_server.url}/1.0/v1/completions", body)
        status, text = post(f"{model_server.url}/1.0/v1/completions", {**body, "stream": True})
    refusal(refused)
    *chunks, done = events(text)
    assert (status, done) == (200, "[DONE]")
    for index in range(4):
        own = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert sum(len(logprobs["tokens"]) for logprobs in own) == 60


def test_event_that_is_too_large_arrives_whole(model_server: TorchServe) -> None:
    body = {"prompt": "one two three four " * 60, "temperature": 0, "max_tokens": 2, "ignore_eos": True, "echo": True}
    url = f"{model_server.url}/1.0/v1/completions"
    whole = json.loads(post(url, {**body, "logprobs": 0})[1])["choices"][0]["logprobs"]
    with beside_an_answer(model_server):
        status, text = post(url, {**body, "logprobs": 20, "stream": True})
    *chunks, done = events(text)
    assert (status, done) == (200, "[DONE]")
    assert max(len(line) for line in text.split("\n")) > LIMIT
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == whole["tokens"]


def test_request_that_is_too_large_is_refused_beside_an_answer(model_server: TorchServe) -> None:
    with beside_an_answer(model_server):
        assert post(f"{model_server.url}/1.0/v1/completions", {"prompt": LIMIT * "x"}, JSON)[0] == 413
