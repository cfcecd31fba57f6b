"""openai's SDK over the Responses API: turns that go on, streams of events, tools, typed answers."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel, Field
from telling import BASE, MODEL, deed, tell

client = openai.OpenAI(base_url=BASE, api_key="none", max_retries=0, timeout=60)
QUESTION = "How is the weather in Paris?"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: int = Field(ge=-50, le=60)


def ask(text: Any, **fields: Any) -> Any:
    return client.responses.create(**{"model": MODEL, "input": text, "temperature": 0, **fields})


@deed
def whole() -> Any:
    response = ask("Hi", instructions="Be brief.")
    return [response.output_text, response.status, response.usage.output_tokens]


@deed
def stream() -> Any:
    with client.responses.stream(model=MODEL, input="Hi", temperature=0) as events:
        text = "".join(own.delta for own in events if own.type == "response.output_text.delta")
        return [text, events.get_final_response().output_text]


@deed
def tool_loop() -> Any:
    called = ask(QUESTION, tools=[WEATHER])
    (call,) = called.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    told = ask([result], tools=[WEATHER], previous_response_id=called.id)
    again = ask([{"role": "user", "content": QUESTION}, call, result], tools=[WEATHER], store=False)
    return [call.name, json.loads(call.arguments), told.output_text, again.output_text]


@deed
def tool_stream() -> Any:
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, tools=[WEATHER]) as events:
        kinds = [own.type for own in events]
        (call,) = events.get_final_response().output
    assert isinstance(call, openai.types.responses.ResponseFunctionToolCall)
    return [call.name, json.loads(call.arguments), kinds.count("response.function_call_arguments.done")]


@deed
def tool_choices() -> Any:
    choices = ("auto", "required", {"type": "function", "name": "get_weather"}, "none")
    answers = [ask("Hi", tools=[WEATHER], tool_choice=own).output[0].type for own in choices]
    return answers


@deed
def typed() -> Any:
    made: Any = client.responses.parse(model=MODEL, input=QUESTION, temperature=0, text_format=Weather).output_parsed
    return [made.city, made.degrees]


@deed
def chat_typed() -> Any:
    messages: Any = [{"role": "user", "content": QUESTION}]
    made: Any = client.chat.completions.parse(model=MODEL, messages=messages, temperature=0, response_format=Weather)
    return [made.choices[0].message.parsed.city, made.choices[0].message.parsed.degrees]


tell("openai")
