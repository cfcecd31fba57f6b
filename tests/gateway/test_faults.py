"""A gateway whose TorchServe loses its worker, then ends altogether: clients are told, and nothing hangs."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest
from deployment import wait_until
from gateway_process import gateway
from serve_process import Served, chat_folder, served_with_gateway

pytestmark = pytest.mark.torchserve

NUM_STREAMS = 24
LONG = {"max_tokens": 450, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_with_gateway(chat_folder(tmp_path_factory.mktemp("faults") / "model")) as served:
        yield served


def events_of(url: str, on_first: Callable[[], object]) -> list[str]:
    """All events of a long stream; `on_first` is called once it has begun."""
    text = b""
    with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "a", "stream": True, **LONG}, timeout=60) as got:
        for piece in got.iter_raw():
            if not text:
                on_first()
            text += piece
    return [event for event in text.decode().split("\n\n") if event]


def assert_ends_with_an_error(events: list[str]) -> None:
    assert events[-1] == "data: [DONE]"
    assert "error" in json.loads(events[-2].removeprefix("data: "))
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["choices"]


def test_worker_that_dies_ends_its_streams_with_an_error_and_is_back_soon(served: Served) -> None:
    def kill() -> None:
        for worker in served.family("model_service_worker.py"):
            worker.send_signal(signal.SIGKILL)

    assert_ends_with_an_error(events_of(served.gateway, kill))
    statuses = []

    def is_back() -> bool:
        got = httpx.post(f"{served.gateway}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=60)
        statuses.append(got.status_code)
        assert got.status_code in (200, 502, 503)
        assert got.status_code == 200 or got.json()["error"]["message"]
        assert got.status_code != 503 or int(got.headers["retry-after"]) > 0
        return got.status_code == 200

    wait_until(is_back, lambda: str(statuses))


def test_server_that_is_killed_ends_all_that_is_open(served: Served) -> None:
    """By a gateway of its own, for the other ends with its server. So many streams are open that none is at its end."""
    begun = threading.Barrier(NUM_STREAMS + 1)
    with gateway(served.direct.removesuffix("/1.0")) as front, ThreadPoolExecutor(NUM_STREAMS) as threads:
        options: Any = {"base_url": f"{front.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}
        with openai.OpenAI(**options) as client, anthropic.Anthropic(**{**options, "base_url": front.url}) as claude:
            streams = [threads.submit(events_of, front.url, lambda: begun.wait(60)) for _ in range(NUM_STREAMS)]
            responses: Any = client.responses.create(
                model="demo", input="a", stream=True, max_output_tokens=450, extra_body={"ignore_eos": True}
            )
            messages: Any = claude.messages.create(
                model="demo",
                max_tokens=450,
                messages=[{"role": "user", "content": "a"}],
                stream=True,
                extra_body={"ignore_eos": True},
            )
            assert next(responses).type == "response.created"
            assert next(messages).type == "message_start"
            begun.wait(60)
            for own in served.process.children(recursive=True):
                if "--upstream" not in own.cmdline():
                    own.send_signal(signal.SIGKILL)
            for stream in streams:
                assert_ends_with_an_error(stream.result(60))
            assert list(responses)[-1].type == "response.failed"
            with pytest.raises(anthropic.APIStatusError):
                list(messages)
        begin = time.monotonic()
        got = httpx.post(f"{front.url}/v1/completions", json={"prompt": "a"}, timeout=60)
        assert got.status_code == 503 and int(got.headers["retry-after"]) > 0
        assert httpx.get(f"{front.url}/health").status_code == 503
        assert time.monotonic() - begin < 40


def test_gateway_beside_a_server_that_was_killed_has_ended_too(served: Served) -> None:
    served.process.wait(60)
    names = [" ".join(own.info["cmdline"] or ()) for own in psutil.process_iter(["cmdline"])]
    assert not [name for name in names if f"--upstream {served.direct.removesuffix('/1.0')}" in name]
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{served.gateway}/live")
