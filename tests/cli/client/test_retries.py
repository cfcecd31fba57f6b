"""What `ts-parallel complete` and `bench` ask again, and what they never do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sse_server import Answer, Cut, Refusal, chunk, event, running, running_at, steady
from typer.testing import CliRunner

from ts_parallel.cli.client.stream_client import Client, Patience, RemoteError
from ts_parallel.cli.main import app

BODY = {"prompt": "x", "max_tokens": 2}
DIED = json.dumps({"code": 500, "type": "InternalServerException", "message": "Worker died."})


def run(command: str, *arguments: str) -> Any:
    return CliRunner(env={"OPENAI_API_KEY": None}).invoke(app, [command, *arguments])


def at_first(*refusals: Refusal) -> Answer:
    """Refuses so many times, and answers from then on."""
    left = list(refusals)

    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        if left:
            raise left.pop(0)
        yield from steady()(body)

    return answer


BUSY = Refusal(429, "too many", Retry_After="0")
STARTING = Refusal(503, "not ready", Retry_After="1")


def test_complete_asks_a_busy_server_again_and_says_so() -> None:
    with running(completions=at_first(BUSY, STARTING, BUSY)) as server:
        result = run("complete", server.url, "x", "--max-tokens", "3")
        assert len(server.bodies) == 4
        assert server.moments[2] - server.moments[1] >= 1  # as Retry-After says
    assert (result.exit_code, result.stdout) == (0, "t0 t1 t2 \n")
    assert "429" in result.stderr and "503" in result.stderr and "asking again in 1 s" in result.stderr


def test_worker_that_died_is_waited_for() -> None:
    with running(completions=at_first(Refusal(500, "", body=DIED))) as server:
        assert run("complete", server.url, "x", "--max-tokens", "1").exit_code == 0
        assert len(server.bodies) == 2


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(400, "wrong", Retry_After="0"),
        Refusal(401, "wrong", Retry_After="0"),
        Refusal(500, "the engine failed", Retry_After="0"),
        Refusal(504, "too long", Retry_After="0"),
        Refusal(503, "nobody says when"),
        Refusal(429, "some day", Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"),
    ],
)
def test_what_would_come_to_the_same_is_not_asked_again(refusal: Refusal) -> None:
    with running(completions=at_first(refusal)) as server:
        result = run("complete", server.url, "x", "--max-tokens", "1")
        assert isinstance(result.exception, RemoteError) and len(server.bodies) == 1


def test_patience_ends() -> None:
    with running(completions=at_first(*[STARTING] * 9)) as server:
        result = run("complete", server.url, "x", "--max-tokens", "1", "--retry-for", "2.5")
        assert isinstance(result.exception, RemoteError) and "503" in str(result.exception)
        assert 2 <= len(server.bodies) <= 3
        assert run("complete", server.url, "x", "--retry-for", "0").exception is not None


def test_answer_that_has_begun_is_never_asked_for_again_and_its_end_is_said() -> None:
    def broken(body: dict[str, Any]) -> Iterator[bytes]:
        yield event(chunk("half an "))
        raise Cut

    def failed(body: dict[str, Any]) -> Iterator[bytes]:
        yield event(chunk("half an "))
        yield event({"error": {"message": "the model was lost", "status": 503}})

    for answer in (broken, failed):
        with running(completions=answer) as server:
            result = run("complete", server.url, "x")
            assert len(server.bodies) == 1
        assert result.stdout.startswith("half an ")
        assert isinstance(result.exception, RemoteError)


def test_server_that_was_there_is_waited_for_and_one_that_never_was_is_not() -> None:
    told: list[float] = []
    with running(completions=steady()) as server:
        client = Client(server.url, patience=Patience(30, lambda error, seconds: told.append(seconds)))
        assert len(list(client.complete(BODY))) > 1
        address = server.url
    never = Client(address, patience=Patience(30))
    begin = time.monotonic()
    with pytest.raises(RemoteError, match="cannot reach"):
        list(never.complete(BODY))
    assert time.monotonic() - begin < 10

    answered: list[bool] = []
    asking = threading.Thread(target=lambda: answered.append(bool(list(client.complete(BODY)))))
    asking.start()
    while not told:  # it has found nobody
        time.sleep(0.05)
    with running_at(urlsplit(address).port or 0, completions=steady()):
        asking.join(40)
    assert answered == [True]


def test_bench_asks_again_counts_it_and_fails_nothing(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with running(completions=at_first(BUSY, BUSY)) as server:
        result = run("bench", server.url, "--concurrency", "2", "--num-requests", "4", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "2 times asked again" in result.stdout and "429" in result.stdout
    assert list(json.loads(file.read_text())["asked_again"].values()) == [2]
