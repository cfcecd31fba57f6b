"""Anthropic's SDK: messages, streams, tools and their loop, the SDK's own tool runner, counts of tokens."""

from __future__ import annotations

from typing import Any

import anthropic
from telling import GATEWAY, MODEL, deed, tell

client = anthropic.Anthropic(base_url=GATEWAY, api_key="none", max_retries=0, timeout=60)
ASK: Any = [{"role": "user", "content": "How is the weather in Paris?"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
}


def ask(**fields: Any) -> Any:
    return client.messages.create(**{"model": MODEL, "max_tokens": 99, "messages": ASK, **fields})


@deed
def whole() -> Any:
    message = ask(system="Be brief.")
    return [message.content[0].text, message.stop_reason, message.usage.output_tokens]


@deed
def stream() -> Any:
    with client.messages.stream(model=MODEL, max_tokens=99, messages=ASK) as stream:
        return ["".join(stream.text_stream), stream.get_final_message().stop_reason]


@deed
def tool_loop() -> Any:
    called = ask(tools=[WEATHER])
    (call,) = called.content
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns = [*ASK, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    told = ask(tools=[WEATHER], messages=turns)
    return [call.name, call.input, called.stop_reason, told.content[0].text]


@deed
def tool_stream() -> Any:
    with client.messages.stream(model=MODEL, max_tokens=99, messages=ASK, tools=[WEATHER]) as stream:
        (call,) = stream.get_final_message().content
    assert call.type == "tool_use"
    return [call.name, call.input]


@deed
def tool_choices() -> Any:
    choices = ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_weather"}, {"type": "none"})
    return [ask(tools=[WEATHER], tool_choice=own).content[0].type for own in choices]


@deed
def tool_runner() -> Any:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: its name.
        """
        return f"sunny in {city}"

    runner = client.beta.messages.tool_runner(model=MODEL, max_tokens=99, messages=ASK, tools=[get_weather])
    last: Any = runner.until_done()
    return last.content[0].text


@deed
def stop_sequence() -> Any:
    message = ask(stop_sequences=[" a "], messages=ASK)
    other = ask(stop_sequences=[" table"], messages=ASK)
    return [message.content[0].text, message.stop_reason, other.content[0].text, other.stop_sequence]


@deed
def count() -> Any:
    counted = client.messages.count_tokens(model=MODEL, messages=ASK, tools=[WEATHER]).input_tokens
    usage = ask(tools=[WEATHER]).usage
    return counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


tell("anthropic")
