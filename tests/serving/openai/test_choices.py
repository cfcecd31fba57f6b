"""Pieces of a choice: what may go out of its text and of its tokens' log-probabilities, and when."""

from __future__ import annotations

import json
from typing import Any

import pytest
from http_client import events

from ts_parallel.engine.request import Request
from ts_parallel.engine.router import Delivery, TokenRouter
from ts_parallel.engine.scheduler import TokenOutput
from ts_parallel.serving.openai.answers import CompletionStream, WholeText
from ts_parallel.serving.openai.choices import Choice, Echo, GenerationJob
from ts_parallel.serving.text.detokenizer import TextDecoder
from ts_parallel.serving.text.stop_strings import StopStrings
from ts_parallel.serving.text.token_texts import TokenTexts
from ts_parallel.step_plan import TokenLogprobs


class Letters:
    """A tokenizer that writes token 1 as a, 2 as b, and nothing for a token above 26, which is special."""

    all_special_ids = (27, 28)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(96 + token_id) for token_id in token_ids if token_id <= 26)

    def get_added_vocab(self) -> dict[str, int]:
        return {f"<{own}>": own for own in self.all_special_ids}

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return chr(96 + token_id) if token_id <= 26 else f"<{token_id}>"


def choice(
    stops: tuple[str, ...] = (), *, has_logprobs: bool = True, echo: Echo | None = None, **request: Any
) -> Choice:
    own = Request("a", (4, 27, 5), 9, **request)
    return Choice(
        own, TextDecoder(Letters()), StopStrings(stops), TokenTexts(Letters()) if has_logprobs else None, echo
    )


def delivery(*token_ids: int, ends: bool = False) -> Delivery:
    logprobs = [TokenLogprobs(-0.5 * token_id) for token_id in token_ids]
    return Delivery(list(token_ids), "length" if ends else None, logprobs=logprobs)


def read(own: Choice, *deliveries: Delivery) -> list[tuple[str, list[tuple[str, int]], str | None]]:
    """Text, tokens with their offsets, and finish reason of each piece."""
    pieces = [own.read(one) for one in deliveries]
    return [
        (piece.text, [(token.own.text, token.offset) for token in piece.tokens or ()], piece.finish_reason)
        for piece in pieces
        if piece is not None
    ]


def test_tokens_come_with_their_text() -> None:
    assert read(choice(), delivery(1, 2), delivery(3, ends=True)) == [
        ("ab", [("a", 0), ("b", 1)], None),
        ("c", [("c", 2)], "length"),
    ]


def test_token_without_letters_comes_with_the_next_that_has_some_or_at_the_end() -> None:
    assert read(choice(), delivery(1, 28), delivery(2), delivery(28, ends=True)) == [
        ("a", [("a", 0)], None),
        ("b", [("<28>", 1), ("b", 1)], None),
        ("", [("<28>", 2)], "length"),
    ]


def test_token_that_may_begin_a_stop_string_waits_as_its_text_does() -> None:
    assert read(choice(("bcd",)), delivery(1, 2), delivery(3), delivery(5, ends=True)) == [
        ("a", [("a", 0)], None),
        ("", [], None),
        ("bce", [("b", 1), ("c", 2), ("e", 3)], "length"),
    ]
    own = choice(("bcd",))
    assert read(own, delivery(1, 2), delivery(3), delivery(4, 5, 6)) == [
        ("a", [("a", 0)], None),
        ("", [], None),
        ("", [], "stop"),
    ]
    assert own.num_tokens == 4 and own.has_stopped_early
    assert own.read(delivery(7)) is None


def test_no_tokens_are_shown_where_nobody_asked() -> None:
    piece = choice(has_logprobs=False).read(Delivery([1]))
    assert piece is not None and piece.tokens is None


def test_echo_comes_first_with_the_tokens_of_the_prompt() -> None:
    scores = [TokenLogprobs(-1.0), TokenLogprobs(-2.0)]
    own = choice(echo=Echo("de", False), prompt_logprobs=scores)
    assert read(own, delivery(1), delivery(2, ends=True)) == [
        ("dea", [("d", 0), ("<27>", 1), ("e", 1), ("a", 2)], None),
        ("b", [("b", 3)], "length"),
    ]


def test_answer_goes_on_rightly_where_a_prompts_tokens_make_another_text() -> None:
    own = choice(("bb",), echo=Echo(" d e ", False), prompt_logprobs=[TokenLogprobs(-1.0)] * 2)
    assert read(own, delivery(1), delivery(2), delivery(3, ends=True)) == [
        (" d e a", [("d", 0), ("<27>", 1), ("e", 1), ("a", 5)], None),
        ("", [], None),
        ("bc", [("b", 6), ("c", 7)], "length"),
    ]


def test_echo_that_is_all_ends_with_the_prompt_and_counts_no_token() -> None:
    own = choice(echo=Echo("de", True), has_logprobs=False)
    assert read(own, delivery(1, ends=True)) == [("de", [], "length")]
    assert own.num_tokens == 0


class Door:
    """The engine's thread, as a job sees it."""

    def __init__(self, *names: str) -> None:
        self.router = TokenRouter()
        self.stopped: list[str] = []
        for name in names:
            self.router.open(name)

    def stop(self, request_id: str) -> None:
        self.stopped.append(request_id)


def two_choices(door: Door, answer: Any, stops: tuple[str, ...] = ()) -> GenerationJob:
    choices = [Choice(Request(name, (4, 5), 9), TextDecoder(Letters()), StopStrings(stops)) for name in ("a", "a/1")]
    return GenerationJob(answer, choices, 2, door)


def stream() -> CompletionStream:
    return CompletionStream("a", "m", 2, include_usage=True, has_usage_in_each=False)


def test_job_ends_with_the_last_of_its_choices() -> None:
    door = Door("a", "a/1")
    job = two_choices(door, stream())
    door.router.deliver([TokenOutput("a/1", 1, "length")])
    reply = job.advance(door.router.take("a"))
    assert reply is not None and (reply.is_first, reply.is_last) == (True, False)
    (chunk,) = events(reply.body)
    assert (chunk["choices"][0]["index"], chunk["choices"][0]["finish_reason"]) == (1, "length")
    assert job.advance(door.router.take("a")) is None
    door.router.deliver([TokenOutput("a", 2, "stop")])
    reply = job.advance(door.router.take("a"))
    assert reply is not None and (reply.is_first, reply.is_last) == (False, True)
    last, usage, done = events(reply.body)
    assert (last["choices"][0]["index"], done) == (0, "[DONE]")
    assert usage["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


def test_choice_that_a_stop_string_ends_is_stopped_while_the_other_goes_on() -> None:
    door = Door("a", "a/1")
    job = two_choices(door, stream(), ("b",))
    door.router.deliver([TokenOutput("a", 2, None), TokenOutput("a/1", 1, None)])
    job.advance(door.router.take("a"))
    assert door.stopped == ["a"]
    door.router.deliver([TokenOutput("a", 3, None), TokenOutput("a/1", 2, None)])
    reply = job.advance(door.router.take("a"))
    assert reply is not None and reply.is_last
    assert door.stopped == ["a", "a/1"]  # the other too, though it ends the job: so it counts as stopped, not as left


@pytest.mark.parametrize("fault", ["engine", "time", "form"])
def test_failure_of_any_choice_fails_the_answer_with_its_own_status(fault: Any) -> None:
    for has_begun in (False, True):
        door = Door("a", "a/1")
        job = two_choices(door, stream() if has_begun else WholeText(2))
        if has_begun:
            door.router.deliver([TokenOutput("a", 1, None)])
            job.advance(door.router.take("a"))
        door.router._mailboxes["a/1"] = Delivery(error="broken", fault=fault)
        reply = job.advance(door.router.take("a"))
        status = {"engine": 500, "time": 504, "form": 400}[fault]
        assert reply is not None and reply.is_last and reply.is_first != has_begun
        assert (reply.body.count("data: [DONE]\n\n"), reply.body.endswith("data: [DONE]\n\n")) == (has_begun, has_begun)
        assert reply.status == (200 if has_begun else status)
        body = events(reply.body)[0] if has_begun else json.loads(reply.body)
        assert body["error"]["status"] == status and body["error"]["message"] == "broken"


def test_text_that_came_with_an_error_goes_out_before_it_whosever_it_is() -> None:
    door = Door("a", "a/1")
    job = two_choices(door, stream())
    door.router.deliver([TokenOutput("a", 1, None), TokenOutput("a/1", 2, None)])
    door.router.deliver([TokenOutput("a/1", 3, "stop", error="too complex")])
    reply = job.advance(door.router.take("a"))
    assert reply is not None and (reply.status, reply.is_first, reply.is_last) == (200, True, True)
    first, second, error, done = events(reply.body)
    texts = {chunk["choices"][0]["index"]: chunk["choices"][0]["text"] for chunk in (first, second)}
    assert texts == {0: "a", 1: "bc"}
    assert (error["error"]["message"], done) == ("too complex", "[DONE]")


def test_error_behind_a_stop_string_is_none() -> None:
    door = Door("a", "a/1")
    job = two_choices(door, stream(), ("b",))
    door.router.deliver([TokenOutput("a", 2, None), TokenOutput("a", 3, None), TokenOutput("a/1", 1, "length")])
    door.router.fail_all("broken")
    reply = job.advance(door.router.take("a"))
    assert reply is not None and reply.is_last
    assert "error" not in reply.body
    assert [chunk["choices"][0]["finish_reason"] for chunk in events(reply.body)[:2]] == ["stop", "length"]


def test_error_before_the_first_token_is_no_echo() -> None:
    door = Door("a")
    own = Choice(Request("a", (4, 5), 1), TextDecoder(Letters()), StopStrings(()), None, Echo("de", True))
    job = GenerationJob(WholeText(), [own], 1, door)
    door.router.fail_all("broken")
    reply = job.advance(door.router.take("a"))
    assert reply is not None and reply.status == 500
