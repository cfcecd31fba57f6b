"""Each answer's shape, from the first piece to the last."""

from __future__ import annotations

import json

from http_client import events

from ts_parallel.errors import EngineError, RequestError
from ts_parallel.serving.exchange import error_body
from ts_parallel.serving.openai.answers import Completion, CompletionStream, TextStream, Usage, WholeText


def test_text_stream_sends_each_piece_as_it_is() -> None:
    answer = TextStream()
    assert answer.advance("a", Usage(1, 1), None) == "a"
    assert answer.advance("", Usage(1, 2), None) is None
    assert answer.advance("b", Usage(1, 3), "stop") == "b"


def test_text_stream_ends_even_without_a_last_piece() -> None:
    assert TextStream().advance("", Usage(1, 1), "stop") == ""


def test_whole_text_waits_for_the_end() -> None:
    answer = WholeText()
    assert answer.advance("a", Usage(1, 1), None) is None
    body = json.loads(answer.advance("b", Usage(1, 2), "length") or "")
    assert body == {
        "text": "ab",
        "finish_reason": "length",
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }


def test_completion_has_openai_shape() -> None:
    body = json.loads(Completion("7", "m").advance("a", Usage(2, 1), "stop") or "")
    assert (body["id"], body["object"], body["model"]) == ("cmpl-7", "text_completion", "m")
    assert body["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["total_tokens"] == 3


def stream_of(include_usage: bool, in_each: bool) -> list[object]:
    answer = CompletionStream("7", "m", include_usage=include_usage, has_usage_in_each=in_each)
    parts = [answer.advance("a", Usage(2, 1), None), answer.advance("é", Usage(2, 2), "length")]
    return events("".join(part or "" for part in parts))


def test_completion_stream_ends_with_the_reason_and_done() -> None:
    first, last, done = stream_of(False, False)
    assert first["choices"][0] == {"index": 0, "text": "a", "logprobs": None, "finish_reason": None}  # type: ignore[index]
    assert last["choices"][0]["text"] == "é"  # type: ignore[index]
    assert last["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
    assert "usage" not in first and done == "[DONE]"  # type: ignore[operator]


def test_usage_comes_in_an_event_of_its_own_before_done() -> None:
    first, _, usage, done = stream_of(True, False)
    assert first["usage"] is None  # type: ignore[index]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 2  # type: ignore[index]
    assert done == "[DONE]"


def test_usage_comes_in_each_event_when_asked_for() -> None:
    first, last, _, _ = stream_of(True, True)
    assert first["usage"]["completion_tokens"] == 1 and last["usage"]["completion_tokens"] == 2  # type: ignore[index]


def test_errors_have_openai_shape() -> None:
    body = json.loads(error_body(RequestError("no", "prompt")))["error"]
    shared = {"message": "no", "type": "invalid_request_error", "param": "prompt", "status": 400}
    assert body == {**shared, "code": None}
    assert json.loads(error_body(RequestError("no", "prompt", "bad")))["error"] == {**shared, "code": "bad"}
    failed = CompletionStream("7", "m", include_usage=False, has_usage_in_each=False).fail(EngineError("died"))
    assert events(failed)[0]["error"]["status"] == 500


def test_no_letter_of_an_event_is_taken_for_the_end_of_a_line() -> None:
    text = "".join(map(chr, [*range(0x20), 0x7F, 0x85, 0xA0, 0x2028, 0x2029, 0x1F600]))
    stream = CompletionStream("7", "m", include_usage=False, has_usage_in_each=False)
    sent = stream.advance(text, Usage(1, 1), "stop") or ""
    chunk, empty, done, _ = sent.splitlines()
    assert (empty, done) == ("", "data: [DONE]")
    assert json.loads(chunk.removeprefix("data: "))["choices"][0]["text"] == text
    assert "\U0001f600" in sent  # what breaks nothing is not written longer than it is
