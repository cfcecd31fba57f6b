"""Whole answers that begin before their end is known: their clients get the status that they end with."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from gateway_process import gateway

ERROR = {"error": {"message": "too slow", "type": "timeout_error", "param": None, "code": None, "status": 504}}


class Model(BaseHTTPRequestHandler):
    """Begins with a head as TorchServe may; `said` follows, or nothing where it is None."""

    protocol_version = "HTTP/1.1"
    said: bytes | None = b""
    header = "ts_stream_next"
    asked: str | None = None

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "demo"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked = self.headers["X-Client-May-Leave"]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header(self.header, "true")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.said is not None:
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(self.said), self.said))
        self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with gateway(f"demo=http://127.0.0.1:{server.server_address[1]}/predictions/demo") as front:
            yield front.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def saying(said: Any, header: str = "ts_stream_next") -> Iterator[None]:
    Model.said, Model.header = said if said is None else json.dumps(said).encode(), header
    yield
    assert Model.asked == "true"


def ask(url: str, route: str = "v1/completions") -> httpx.Response:
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    body = {"input": "x"} if route == "v1/responses" else {"prompt": "x", **chat}
    return httpx.post(f"{url}/{route}", json=body, timeout=60)


def test_answer_is_passed_as_it_is(url: str) -> None:
    with saying({"choices": []}):
        assert (ask(url).status_code, ask(url).json()) == (200, {"choices": []})


@pytest.mark.parametrize("route", ["v1/completions", "v1/chat/completions", "tokenize", "v1/responses", "v1/messages"])
def test_error_after_the_head_has_its_own_status(url: str, route: str) -> None:
    with saying(ERROR):
        got = ask(url, route)
        assert got.status_code == 504 and "too slow" in got.json()["error"]["message"]


@pytest.mark.parametrize("route", ["v1/completions", "v1/chat/completions", "v1/responses", "v1/messages"])
def test_answer_that_is_cut_off_may_be_asked_for_again(url: str, route: str) -> None:
    with saying(None):
        got = ask(url, route)
        assert got.status_code == 503 and int(got.headers["retry-after"]) > 0
        assert "in the middle of its answer" in got.json()["error"]["message"]


def test_body_of_an_answer_that_did_not_begin_early_is_no_error(url: str) -> None:
    with saying(ERROR, header="X-Other"):
        assert (ask(url).status_code, ask(url).json()) == (200, ERROR)
