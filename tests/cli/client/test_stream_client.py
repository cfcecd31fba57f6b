"""The client against a server that streams as ours does, and against one that breaks in every way."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from sse_server import Answer, Cut, Refusal, chat, chunk, event, running, steady, usage

from ts_parallel.cli.client.remote import base_url, find_model
from ts_parallel.cli.client.stream_client import Client, RemoteError, Usage
from ts_parallel.errors import ConfigError

BODY = {"model": "demo", "prompt": "a b c", "max_tokens": 3}


def pieces_of(*parts: bytes) -> Answer:
    """These bytes, each sent by itself."""

    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        for part in parts:
            yield part
            time.sleep(0.01)

    return answer


def failing(error: Exception, *parts: bytes) -> Answer:
    def answer(body: dict[str, Any]) -> Iterator[bytes]:
        yield from parts
        raise error

    return answer


def test_pieces_come_with_text_usage_and_rising_moments() -> None:
    with running(completions=steady(gap=0.01)) as server:
        options = {"include_usage": True, "continuous_usage_stats": True}
        pieces = list(Client(server.url).complete({**BODY, "stream_options": options}))
        assert server.bodies == [{**BODY, "stream_options": options, "stream": True}]
    assert [piece.text for piece in pieces] == ["t0 ", "t1 ", "t2 ", ""]
    assert [piece.finish_reason for piece in pieces] == [None, None, "length", None]
    assert [piece.usage for piece in pieces] == [Usage(3, count, 0) for count in (1, 2, 3, 3)]
    assert [piece.has_choice for piece in pieces] == [True, True, True, False]
    moments = [piece.moment for piece in pieces]
    assert moments == sorted(moments)


def test_moment_of_a_piece_is_the_one_at_which_it_came() -> None:
    with running(completions=steady(delay=0.3, gap=0.3)) as server:
        started = time.perf_counter()
        moments = [piece.moment - started for piece in Client(server.url).complete(BODY)]
    assert 0.3 <= moments[0] < 3
    assert 0.6 <= moments[1] < 6


def test_chat_is_the_content_of_its_deltas() -> None:
    with running(chat=chat("Good ", "day")) as server:
        assert "".join(piece.text for piece in Client(server.url).chat({"messages": []})) == "Good day"


def test_events_may_be_cut_anywhere_and_written_in_every_way_that_the_standard_allows() -> None:
    whole = event(chunk("héllo")) + b": a comment\r\n\r\n" + b'event: x\ndata:{"choices": \r\ndata: []}\r\n\r\n'
    whole += event(chunk("", "stop")) + event("[DONE]")
    with running(completions=pieces_of(*(whole[at : at + 1] for at in range(len(whole))))) as server:
        bytewise = [piece.text for piece in Client(server.url).complete(BODY)]
        server.answers["completions"] = pieces_of(whole)
        at_once = [piece.text for piece in Client(server.url).complete(BODY)]
    assert bytewise == at_once == ["héllo", "", ""]


def test_reason_to_finish_is_an_end_where_the_end_mark_is_missing() -> None:
    with running(completions=pieces_of(event(chunk("all", "stop")))) as server:
        assert [piece.text for piece in Client(server.url).complete(BODY)] == ["all"]


def test_answer_is_whole_at_its_end_mark_however_the_connection_ends() -> None:
    with running(completions=failing(Cut(), event(chunk("all")), event("[DONE]"))) as server:
        assert [piece.text for piece in Client(server.url).complete(BODY)] == ["all"]


def test_cached_tokens_are_read() -> None:
    last = event({"choices": [], "usage": usage(9, 4, 8)})
    with running(completions=pieces_of(last, event("[DONE]"))) as server:
        assert [piece.usage for piece in Client(server.url).complete(BODY)] == [Usage(9, 4, 8)]


@pytest.mark.parametrize(
    ("answer", "says", "status"),
    [
        (failing(Refusal(400, "too\nlong", "prompt")), "the server answered 400 to completions: too long", 400),
        (failing(Refusal(503, "", body='{"code": 503, "message": "full"}')), "answered 503 to completions: full", 503),
        (failing(Refusal(422, "", body='{"detail": "no"}')), "answered 422 to completions: no", 422),
        (failing(Refusal(502, "", body="<html>")), "answered 502 to completions: <html>", 502),
        (failing(Refusal(500, "", body="")), "answered 500 to completions: Internal Server Error", 500),
        (failing(Refusal(200, "", body='{"choices": []}')), "application/json, no stream of events", None),
        (failing(Cut(), event(chunk("a"))), "the connection broke", None),
        (pieces_of(event(chunk("a"))), "cut off before its end", None),
        (pieces_of(event(chunk("a")), event({"error": {"message": "it broke"}})), "^it broke$", None),
        (pieces_of(b"data: {\n\n"), "none of OpenAI's: {", None),
        (pieces_of(b"data: [1]\n\n"), "none of OpenAI's", None),
        (pieces_of(event({"choices": 5})), "none of OpenAI's", None),
    ],
)
def test_whatever_breaks_is_one_line_that_says_what(answer: Answer, says: str, status: int | None) -> None:
    with running(completions=answer) as server:
        with pytest.raises(RemoteError, match=says) as raised:
            list(Client(server.url).complete(BODY))
    assert raised.value.status == status
    assert "\n" not in str(raised.value)


def test_refusal_names_the_field_it_blames() -> None:
    with running(completions=failing(Refusal(400, "too many", "max_tokens"))) as server:
        with pytest.raises(RemoteError) as raised:
            list(Client(server.url).complete(BODY))
    assert raised.value.parameter == "max_tokens"


def test_nobody_listening_is_said_with_the_url() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(RemoteError, match=f"cannot reach {url}: Connection refused"):
            list(Client(url).complete(BODY))


def dripping(body: dict[str, Any]) -> Iterator[bytes]:
    for _ in range(200):
        yield b": still here\n"
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [steady(delay=3), steady(gap=3), dripping])
def test_timeout_is_of_the_whole_answer_however_it_drips(answer: Answer) -> None:
    with running(completions=answer) as server:
        started = time.perf_counter()
        with pytest.raises(RemoteError, match=r"longer than 0\.3 s"):
            list(Client(server.url, timeout=0.3).complete({**BODY, "max_tokens": 2}))
        assert time.perf_counter() - started < 2.5


def test_closing_the_iterator_ends_the_connection() -> None:
    with running(completions=dripping) as server:
        server.answers["completions"] = steady(gap=0.02)
        with closing(Client(server.url).complete({**BODY, "max_tokens": 400})) as pieces:
            next(pieces)
        assert server.has_left.wait(5)


def test_key_is_sent_as_a_bearer_token() -> None:
    with running(completions=steady()) as server:
        list(Client(server.url, "secret").complete(BODY))
        list(Client(server.url).complete(BODY))
        assert server.keys == ["Bearer secret", None]


@pytest.mark.parametrize("url", ["127.0.0.1:8080/v1", "ftp://host/v1", "http:///v1", "http://h:x/v1", "http://h/ü", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no URL"):
        Client(url)


def test_key_that_would_break_the_header_is_refused() -> None:
    with pytest.raises(ConfigError, match="API key") as raised:
        Client("http://h/v1", "a\r\nb")
    assert "a\r" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://h:8080/predictions/demo", "http://h:8080/predictions/demo/1.0/v1"),
        ("http://h:8080/predictions/demo/1.0/v1/", "http://h:8080/predictions/demo/1.0/v1"),
        ("http://h:8000", "http://h:8000/v1"),
        ("https://api.example.org/v1", "https://api.example.org/v1"),
    ],
)
def test_base_url_is_made_of_what_serve_prints(given: str, meant: str) -> None:
    assert base_url(given) == meant


def test_model_is_the_only_one_that_is_served() -> None:
    with running() as server:
        assert find_model(Client(server.url)) == "demo"
        server.models = ["a", "b"]
        with pytest.raises(ConfigError, match=r"serves 2 models: choose one with --model \(a, b\)"):
            find_model(Client(server.url))
        server.models = []
        with pytest.raises(ConfigError, match=r"answered 404 to models: no route /v1/models.*--model"):
            find_model(Client(server.url))
