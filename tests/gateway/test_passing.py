"""A gateway before servers that do as they are told: what passes, what is refused, and what happens where one fails."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import sse_server
from gateway_process import Gateway, gateway
from sse_server import END, Cut, Recorder, Refusal, chunk, event, steady, whole

from ts_parallel.cli.server.torchserve import free_ports

KEY = "correct-horse"


def upstream_of(recorder: Recorder) -> str:
    return f"demo={recorder.url.removesuffix('/v1')}/predictions/demo"


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with sse_server.running(completions=steady(), chat=whole({"choices": []})) as recorder:
        yield recorder


@pytest.fixture(scope="module")
def front(recorder: Recorder) -> Iterator[Gateway]:
    """One model, no key, a small limit of a body."""
    with gateway(upstream_of(recorder), options=("--max-request-size", "64KiB", "--timeout", "2")) as front:
        yield front


@pytest.fixture
def answers(recorder: Recorder) -> Iterator[Recorder]:
    """The server, whose answers a test may change."""
    before = dict(recorder.answers)
    recorder.has_left.clear()
    yield recorder
    recorder.answers.clear()
    recorder.answers.update(before)


def ask(front: Gateway, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    return httpx.post(f"{front.url}{path}", json={"prompt": "a", "max_tokens": 4, **fields}, timeout=30)


def test_body_and_events_pass_byte_by_byte(front: Gateway, answers: Recorder) -> None:
    sent = event(chunk("é 例\u2028✅")) + event(chunk("b" * 70000)) + END  # the second is larger than one read

    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        yield from (sent[at : at + 999] for at in range(0, len(sent), 999))

    answers.answers["completions"] = answer
    body = b'{"model":"demo", "prompt":"\\u00e9",  "stream":true}'
    got = httpx.post(f"{front.url}/v1/completions", content=body, timeout=30)
    assert got.content == sent
    assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answers.headers[-1]["content-length"] == str(len(body))
    assert answers.bodies[-1] == json.loads(body)


def test_each_piece_passes_as_soon_as_it_comes(front: Gateway, answers: Recorder) -> None:
    may_go_on = threading.Event()

    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        yield event(chunk("a"))
        assert may_go_on.wait(20)
        yield END

    answers.answers["completions"] = answer
    with httpx.stream("POST", f"{front.url}/v1/completions", json={"stream": True}, timeout=30) as got:
        pieces = got.iter_raw()
        assert next(pieces) == event(chunk("a"))
        may_go_on.set()
        assert b"".join(pieces) == END


def test_model_may_be_left_out_where_there_is_one(front: Gateway) -> None:
    assert ask(front).status_code == 200
    assert ask(front, model="demo").status_code == 200
    assert ask(front, model=None).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_unknown_model_is_a_404_that_names_those_there_are(front: Gateway, path: str) -> None:
    got = ask(front, path, model="nope", input="x")
    assert got.status_code == 404
    error = got.json()["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model"
    assert "'nope'" in error["message"] and "demo" in error["message"]


def test_two_models_are_told_apart_by_their_names(recorder: Recorder) -> None:
    with (
        sse_server.running(completions=whole({"from": "other"})) as other,
        gateway(upstream_of(recorder), f"big={other.url.removesuffix('/v1')}/predictions/demo") as front,
    ):
        assert ask(front, model="big").json() == {"from": "other"}
        assert other.bodies[-1]["model"] == "demo"  # as its own server calls it
        assert ask(front, model="demo").status_code == 200
        missing = ask(front)
        assert missing.status_code == 400 and "demo, big" in missing.json()["error"]["message"]
        models = httpx.get(f"{front.url}/v1/models").json()
        assert [model["id"] for model in models["data"]] == ["demo", "big"]
        assert httpx.get(f"{front.url}/v1/models/big").json()["id"] == "big"
        assert httpx.get(f"{front.url}/v1/models/none").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("body", "says"), [(b"{", "not JSON"), (b"[1]", "must be a JSON object"), (b'{"model": 1}', "must be a text")]
)
def test_broken_body_is_refused_for_that_request_alone(front: Gateway, body: bytes, says: str) -> None:
    got = httpx.post(f"{front.url}/v1/completions", content=body)
    assert got.status_code == 400 and says in got.json()["error"]["message"]
    assert ask(front).status_code == 200


def test_refusal_of_the_model_passes_as_it_is(front: Gateway, answers: Recorder) -> None:
    said = '{"error": {"message": "no", "type": "t", "param": "p", "code": "c", "more": 1}}'
    answers.answers["completions"] = refusing(429, said)
    got = ask(front)
    assert (got.status_code, got.text) == (429, said)
    assert int(got.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("theirs", "kind", "ours"),
    [
        (500, "InternalServerException", 503),
        (503, "ServiceUnavailableException", 503),
        (400, "InvalidKeyException", 502),
        (404, "ModelNotFoundException", 404),
        (413, "TooLargeFrameException", 413),
    ],
)
def test_refusal_of_torchserve_comes_in_openais_shape(
    front: Gateway, answers: Recorder, theirs: int, kind: str, ours: int
) -> None:
    body = json.dumps({"code": theirs, "type": kind, "message": "Worker died."})
    answers.answers["completions"] = refusing(theirs, body)
    got = ask(front)
    assert got.status_code == ours
    assert "Worker died." in got.json()["error"]["message"]
    assert ("retry-after" in got.headers) == (ours == 503)


def refusing(status: int, body: str) -> sse_server.Answer:
    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        raise Refusal(status, "", body=body)
        yield

    return answer


def test_stream_that_is_cut_ends_with_an_error_and_its_mark(front: Gateway, answers: Recorder) -> None:
    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        yield event(chunk("a"))
        yield b'data: {"half of an ev'
        raise Cut

    answers.answers["completions"] = answer
    got = ask(front, stream=True)
    first, error, end = [part for part in got.text.split("\n\n") if part]
    assert first == f"data: {json.dumps(chunk('a'))}"
    assert "in the middle of its answer" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert end == "data: [DONE]"
    answers.answers["completions"] = steady()
    assert ask(front).status_code == 200


def test_upstream_that_says_nothing_is_given_up(front: Gateway, answers: Recorder) -> None:
    def silent(body: dict[str, Any]) -> Iterator[bytes]:
        if body["prompt"] == "late":
            yield event(chunk("a"))
        answers.stop.wait(6)
        yield END

    answers.answers["completions"] = silent
    begin = time.monotonic()
    got = ask(front)
    assert got.status_code == 504 and "--timeout" in got.json()["error"]["message"]
    got = ask(front, stream=True, prompt="late")
    assert "said nothing for 2 s" in got.text and got.text.endswith("data: [DONE]\n\n")
    assert time.monotonic() - begin < 30


def test_upstream_that_is_not_up_is_a_503_until_it_is() -> None:
    (port,) = free_ports(1)
    with gateway(f"demo=http://127.0.0.1:{port}/predictions/demo") as front:
        got = ask(front)
        assert got.status_code == 503 and int(got.headers["retry-after"]) > 0
        assert "is not up" in got.json()["error"]["message"]
        assert httpx.get(f"{front.url}/v1/models").status_code == 503
        assert httpx.get(f"{front.url}/live").status_code == 200
        ready = httpx.get(f"{front.url}/ready")
        assert ready.status_code == 503 and "is not up" in ready.json()["models"]["demo"]


def test_client_that_leaves_ends_the_upstreams_work(front: Gateway, answers: Recorder) -> None:
    answers.answers["completions"] = steady(gap=0.02)
    with httpx.stream("POST", f"{front.url}/v1/completions", json={"prompt": "a", "max_tokens": 10**6}) as got:
        next(got.iter_raw())
    assert answers.has_left.wait(10)


def test_client_that_leaves_before_the_answer_ends_the_upstreams_work(front: Gateway, answers: Recorder) -> None:
    begun, left = threading.Event(), threading.Event()

    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        begun.set()
        assert left.wait(20)
        while True:  # until it is noticed
            yield event(chunk("a" * 1000))
            time.sleep(0.01)

    answers.answers["completions"] = answer
    parts = urlsplit(front.url)
    with socket.create_connection((parts.hostname, parts.port)) as client:
        body = b'{"prompt": "a"}'
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert begun.wait(20)
    left.set()
    assert answers.has_left.wait(20)


def test_slow_reader_holds_its_upstream_back_and_gets_all(front: Gateway, answers: Recorder) -> None:
    """What is not read does not gather in the gateway: the upstream stands still meanwhile."""
    sent = 0

    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        nonlocal sent
        for _number in range(400):
            yield event(chunk("x" * 100_000))
            sent += 1
        yield END

    answers.answers["completions"] = answer
    parts = urlsplit(front.url)
    client = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    client.request("POST", "/v1/completions", b'{"prompt": "a"}')
    got = client.getresponse()
    before = -1
    while before != sent:  # until nothing moves any more
        before = sent
        time.sleep(0.5)
    assert sent < 300
    text = got.read()
    assert sent == 400 and text.endswith(END) and len(text) > 40_000_000
    client.close()
