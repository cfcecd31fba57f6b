"""What clients put into messages reaches chat templates in the shape they are written for, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from ts_parallel.errors import RequestError
from ts_parallel.serving.openai.fields.messages import plain_messages, read_arguments


def plain(**message: Any) -> dict[str, Any]:
    (own,) = plain_messages([{"role": "user", **message}])
    return own


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a", "a"),
        ("", ""),
        ([], ""),
        (None, ""),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        ([{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}], "one"),
        ([{"type": "input_text", "text": "one"}, {"type": "output_text", "text": "two"}], "one\ntwo"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        (["one", {"text": "two"}], "one\ntwo"),
        ([{"type": "text", "text": None}, {"type": "text", "text": "one"}], "one"),
    ],
)
def test_content_is_one_text_whatever_its_parts_are_called(content: Any, text: str) -> None:
    assert plain(content=content) == {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image_url", "image_url": {"url": "data:…"}}, "part 1 is of type 'image_url': this model reads text"),
        ({"type": "input_image", "image_url": "x"}, "input_image"),
        ({"type": "input_audio", "input_audio": {}}, "input_audio"),
        ({"type": "file", "file": {}}, "'file'"),
        ({}, "part with a type"),
        ({"type": ["text"]}, "part with a type"),
        ({"type": "text", "text": 5}, "text is no text, got 5"),
        (5, "part with a type"),
        (None, "part with a type"),
    ],
)
def test_part_that_is_no_text_is_refused_with_its_place(part: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says) as refusal:
        plain_messages([{"role": "user", "content": "x"}, {"role": "user", "content": ["a", part]}])
    assert refusal.value.parameter == "messages"
    assert str(refusal.value).startswith("message 1, part 1")


def test_nulls_and_empty_lists_of_an_sdk_are_absent() -> None:
    dumped = {"content": "hi", "refusal": None, "audio": None, "function_call": None, "annotations": None, "name": None}
    for calls in (None, []):
        assert plain(role="assistant", tool_calls=calls, **dumped) == {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize("arguments", ['{"a": 3}', {"a": 3}])
def test_arguments_of_a_call_are_an_object(arguments: Any) -> None:
    call = {"id": "c1", "type": "function", "index": None, "function": {"name": "mul", "arguments": arguments}}
    own = plain(role="assistant", content=None, tool_calls=[call])
    assert own["content"] is None
    assert own["tool_calls"] == [{"id": "c1", "type": "function", "function": {"name": "mul", "arguments": {"a": 3}}}]


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ("", {}),
        (None, {}),
        ('{"a": {"b": [1]}}', {"a": {"b": [1]}}),
        ('{"a": ', '{"a": '),
        ("[1]", "[1]"),
        ("3", "3"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_arguments_that_are_no_object_stay_as_the_model_wrote_them(arguments: Any, read: Any) -> None:
    assert read_arguments(arguments) == read


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"a":' * 300 + "1" + "}" * 300])
def test_what_no_template_can_print_is_refused_inside_arguments_too(text: str) -> None:
    with pytest.raises(RequestError, match=r"surrogate|levels"):
        read_arguments(text)


def test_calls_of_the_first_api_are_calls_of_a_tool() -> None:
    own = plain(role="assistant", content=None, function_call={"name": "f", "arguments": "{}"})
    assert own["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert plain(role="function", name="f", content="1") == {"role": "tool", "name": "f", "content": "1"}


def test_what_an_assistant_thought_is_beside_what_it_said() -> None:
    content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]
    assert plain(role="assistant", content=content) == {
        "role": "assistant",
        "reasoning_content": "hm",
        "content": "yes",
    }
    assert plain(role="assistant", content=None, refusal="no")["content"] == "no"


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": {"id": "c"}},
        {"tool_calls": ["x"]},
        {"tool_calls": [{"function": None}]},
        {"tool_calls": [{"function": {"arguments": "{}"}}]},
        {"audio": {"id": "a"}},
    ],
)
def test_message_of_no_known_shape_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="message 0") as refusal:
        plain(role="assistant", **message)
    assert refusal.value.parameter == "messages"
