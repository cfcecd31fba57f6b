"""`ts-parallel serve` that is told to end: nothing new is taken, what is open finishes, and then it ends."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_process import Served, chat_folder, served_with_gateway

pytestmark = pytest.mark.torchserve

NUM_STREAMS, NUM_CHOICES, LONG = 6, 4, 480
BODY = {"prompt": "Return a list of", "max_tokens": LONG, "n": NUM_CHOICES, "ignore_eos": True, "stream": True}


def stream(url: str, begun: Callable[[], object]) -> list[dict[str, Any]]:
    """The chunks of a completion; a cut stream raises."""
    chunks = []
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=100) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line == "data: [DONE]":
                return chunks
            if line:
                chunks.append(json.loads(line.removeprefix("data: ")))
                begun()
    raise AssertionError("no end")


@contextmanager
def streams(served: Served) -> Iterator[list[Future[list[dict[str, Any]]]]]:
    """Half of them by the gateway, once each has begun."""
    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        begun = [threading.Event() for _ in range(NUM_STREAMS)]
        urls = [served.direct, served.gateway] * (NUM_STREAMS // 2)
        answers = [threads.submit(stream, url, own.set) for url, own in zip(urls, begun, strict=True)]
        for own in begun:
            assert own.wait(30), [answer.exception() for answer in answers if answer.done()]
        yield answers


def test_what_is_open_finishes_and_nothing_new_is_taken(tmp_path: Path) -> None:
    with served_with_gateway(chat_folder(tmp_path / "demo"), "--drain-timeout", "100") as served:
        assert httpx.get(f"{served.gateway}/ready").status_code == 200
        with streams(served) as answers:
            served.process.send_signal(signal.SIGTERM)
            refused = {}
            for url in (served.direct, served.gateway):
                while (
                    response := httpx.post(f"{url}/v1/completions", json={**BODY, "stream": False})
                ).status_code == 200:
                    assert not all(answer.done() for answer in answers)
                refused[url] = response
            ready = httpx.get(f"{served.gateway}/ready")
            health = httpx.get(f"{served.direct}/health")
            assert not all(answer.done() for answer in answers)
        for response in refused.values():
            assert response.status_code == 503 and response.headers["Retry-After"] == "10"
            assert response.json()["error"]["code"] == "server_shutting_down"
        assert ready.status_code == health.status_code == 503
        for answer in answers:
            ends = [own["finish_reason"] for chunk in answer.result() for own in chunk["choices"]]
            assert ends.count("length") == NUM_CHOICES
        assert served.process.wait(60) == 0


@pytest.mark.parametrize("how", ["timeout", "second signal"])
def test_what_does_not_finish_in_time_is_broken_off(how: str, tmp_path: Path) -> None:
    seconds = "1" if how == "timeout" else "300"
    with served_with_gateway(chat_folder(tmp_path / "demo"), "--drain-timeout", seconds) as served:
        with streams(served) as answers:
            served.process.send_signal(signal.SIGTERM)
            if how == "second signal":
                time.sleep(0.7)
                served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(60) == 0
        assert any(answer.exception() is not None for answer in answers)
