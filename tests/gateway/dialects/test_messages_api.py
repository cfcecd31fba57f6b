"""Anthropic's v1/messages over chat completions, as its own client reads it; the model's part says what a test has it
say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
import sse_server
from gateway_process import Gateway, gateway
from sse_server import END, Answer, Cut, Recorder, Refusal, event, whole

from ts_parallel.errors import RequestError
from ts_parallel.gateway.dialects.messages_input import chat_fields
from ts_parallel.gateway.dialects.messages_output import StopText

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
TOOL: Any = {"name": "mul", "description": "a × b", "input_schema": {"type": "object"}}
ASK: Any = [{"role": "user", "content": "3 × 4?"}]


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with sse_server.running(chat=whole({}), tokenize=whole({"count": 11, "tokens": []})) as recorder:
        yield recorder


@pytest.fixture(scope="module")
def front(recorder: Recorder) -> Iterator[Gateway]:
    with gateway(f"{recorder.url.removesuffix('/v1')}/predictions/demo") as front:
        yield front


@pytest.fixture
def client(front: Gateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=front.url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def streamed(*deltas: dict[str, Any], finish_reason: str = "stop") -> Answer:
    def answer(_: dict[str, Any]) -> Iterator[bytes]:
        for delta in (*deltas, {}):
            choice = {"index": 0, "delta": delta, "finish_reason": None if delta else finish_reason}
            yield event({"choices": [choice], "usage": USAGE})
        yield event({"choices": [], "usage": USAGE}) + END

    return answer


def at_once(message: dict[str, Any], finish_reason: str = "stop") -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    return whole({"choices": [choice], "usage": USAGE})


def test_whole_answer_has_its_text_and_its_counts(client: Any, recorder: Recorder) -> None:
    recorder.answers["chat"] = at_once({"content": "12"})
    message: Any = client.messages.create(model="demo", max_tokens=9, messages=ASK, system="Be brief.")
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("12", "end_turn", None)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens, message.usage.output_tokens) == (3, 4, 3)
    sent = recorder.bodies[-1]
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 × 4?"}]
    assert sent["max_tokens"] == 9 and sent.keys() == {"model", "messages", "max_tokens", "stream"}


def test_events_come_in_their_order_and_add_up_to_the_message(client: Any, recorder: Recorder) -> None:
    recorder.answers["chat"] = streamed(
        {"role": "assistant", "reasoning_content": "Let me "},
        {"reasoning_content": "see."},
        {"content": "I ask."},
        {"tool_calls": [{"index": 0, "id": "call_0", "function": {"name": "mul", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "3}"}}]},
        {"tool_calls": [{"index": 1, "id": "call_1", "function": {"name": "now", "arguments": ""}}]},
        finish_reason="tool_calls",
    )
    events = list(client.messages.create(model="demo", max_tokens=9, messages=ASK, tools=[TOOL], stream=True))
    block = ("content_block_start", "content_block_delta", "content_block_stop")
    assert [own.type for own in events if str(own.type) != "ping"] == [
        "message_start",
        *(block[0], block[1], block[1], block[2]),
        *block,
        *(block[0], block[1], block[1], block[2]),
        *(block[0], block[2]),
        "message_delta",
        "message_stop",
    ]
    start: Any = events[0]
    assert start.message.usage.input_tokens == 3  # known from the first event on
    with client.messages.stream(model="demo", max_tokens=9, messages=ASK, tools=[TOOL]) as stream:
        final: Any = stream.get_final_message()
    assert [own.type for own in final.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert final.content[0].thinking == "Let me see."
    assert (final.content[2].id, final.content[2].name, final.content[2].input) == ("call_0", "mul", {"a": 3})
    assert final.content[3].input == {}
    assert final.stop_reason == "tool_use" and final.usage.output_tokens == 3


def test_conversation_with_tools_reaches_the_model_as_chat(client: Any, recorder: Recorder) -> None:
    recorder.answers["chat"] = at_once({"content": "12"})
    conversation: Any = [
        *ASK,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I ask"},
                {"type": "tool_use", "id": "t1", "name": "mul", "input": {"a": 3}},
                {"type": "tool_use", "id": "t2", "name": "mul", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "12"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "none", "is_error": True},
                {"type": "text", "text": "So?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    client.messages.create(
        model="demo",
        max_tokens=9,
        messages=conversation,
        tools=[TOOL],
        system=[{"type": "text", "text": "A"}, {"type": "text", "text": "B"}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        metadata={"user_id": "u"},
        extra_body={"top_k": 5},
    )
    sent = recorder.bodies[-1]
    assert [own["role"] for own in sent["messages"]] == ["system", "user", "assistant", "tool", "tool", "user"]
    assert sent["messages"][0]["content"] == "A\nB"
    assistant = sent["messages"][2]
    assert assistant["content"] == "I ask" and assistant["reasoning_content"] == "hm"
    assert [own["function"]["arguments"] for own in assistant["tool_calls"]] == ['{"a": 3}', "{}"]
    assert sent["messages"][3] == {"role": "tool", "tool_call_id": "t1", "content": "12"}
    assert sent["messages"][5] == {"role": "user", "content": "So?"}
    assert sent["tool_choice"] == "required" and sent["parallel_tool_calls"] is False
    function = {"name": "mul", "description": "a × b", "parameters": {"type": "object"}}
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert sent["top_k"] == 5 and "metadata" not in sent


@pytest.mark.parametrize("is_stream", [False, True])
def test_stop_sequence_is_named_and_not_shown(client: Any, recorder: Recorder, is_stream: bool) -> None:
    answer = streamed({"content": "one EN"}, {"content": "DS two E"}, {"content": "ND"})
    recorder.answers["chat"] = answer if is_stream else at_once({"content": "one ENDS two END"})
    with client.messages.stream(model="demo", max_tokens=9, messages=ASK, stop_sequences=["END", "xx"]) as stream:
        final: Any = stream.get_final_message() if is_stream else None
    if not is_stream:
        final = client.messages.create(model="demo", max_tokens=9, messages=ASK, stop_sequences=["END", "xx"])
    assert final.content[0].text == "one ENDS two "
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "END")
    assert recorder.bodies[-1]["stop"] == ["END", "xx"] and recorder.bodies[-1]["include_stop_str_in_output"] is True


@pytest.mark.parametrize("text", ["abcab", "aab", "abab", "xyz", "", "aaab"])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_stop_text_of_any_cut_is_that_of_the_whole(text: str, is_stopped: bool) -> None:
    stops = ("ab", "cab")
    found = max((own for own in stops if is_stopped and text.endswith(own)), key=len, default=None)
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            own = StopText(stops)
            shown = "".join(map(own.add, (text[:first], text[first:second], text[second:])))
            assert shown + own.end(is_stopped) == (text.removesuffix(found) if found else text)
            assert own.found == found


def test_answer_that_was_cut_short_is_told_as_such(client: Any, recorder: Recorder) -> None:
    recorder.answers["chat"] = at_once({"content": "1"}, "length")
    assert client.messages.create(model="demo", max_tokens=1, messages=ASK).stop_reason == "max_tokens"


def test_tokens_are_counted_by_the_model(client: Any, recorder: Recorder) -> None:
    assert client.messages.count_tokens(model="demo", messages=ASK, system="S", tools=[TOOL]).input_tokens == 11
    sent = recorder.bodies[-1]
    assert [own["role"] for own in sent["messages"]] == ["system", "user"] and len(sent["tools"]) == 1


def test_refusals_have_anthropics_shape(client: Any, recorder: Recorder) -> None:
    with pytest.raises(anthropic.NotFoundError, match="'claude'"):
        client.messages.create(model="claude", max_tokens=1, messages=ASK)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.post("/v1/messages", body={"model": "demo", "messages": ASK}, cast_to=object)

    def busy(_: dict[str, Any]) -> Iterator[bytes]:
        raise Refusal(429, "too many wait")
        yield

    recorder.answers["chat"] = busy
    with pytest.raises(anthropic.RateLimitError, match="too many wait") as refusal:
        client.messages.create(model="demo", max_tokens=1, messages=ASK, stream=True)
    body: Any = refusal.value.body
    assert body["error"]["type"] == "rate_limit_error"


def test_stream_that_is_cut_ends_with_an_error_event(client: Any, recorder: Recorder) -> None:
    def cut(_: dict[str, Any]) -> Iterator[bytes]:
        yield event({"choices": [{"index": 0, "delta": {"content": "Par"}, "finish_reason": None}]})
        raise Cut

    recorder.answers["chat"] = cut
    seen = []
    with pytest.raises(anthropic.APIStatusError, match="in the middle of its answer"):
        for own in client.messages.create(model="demo", max_tokens=1, messages=ASK, stream=True):
            seen.append(own.type)
    assert "content_block_delta" in seen and "message_stop" not in seen


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0: a message's role"),
        ({"messages": [{"role": "user", "content": [{"type": "search_result"}]}]}, "messages.0.content.0"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0: only tools with an input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice"),
        ({"stop_sequences": ["", "x"]}, "stop_sequences"),
        ({"output_config": {"format": {"type": "xml"}}}, "json_schema"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as refusal:
        chat_fields({"max_tokens": 4, "messages": ASK, **fields})
    assert says in str(refusal.value)
