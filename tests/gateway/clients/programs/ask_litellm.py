"""LiteLLM, as a client of OpenAI's API and of vLLM's: completions, streams, tools, forms, responses, messages."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm
from telling import BASE, MODEL, deed, tell

OWN: dict[str, Any] = {"api_base": BASE, "api_key": "none", "timeout": 60, "num_retries": 0}
PROVIDERS = ("openai", "hosted_vllm")
ASK = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}}


def chat(provider: str, **fields: Any) -> Any:
    return litellm.completion(model=f"{provider}/{MODEL}", **{"messages": ASK, "temperature": 0, **OWN, **fields})


def calls_of(message: Any) -> list[Any]:
    return [[call.function.name, json.loads(call.function.arguments)] for call in message.tool_calls or []]


@deed
def completion() -> Any:
    answers = [chat(provider) for provider in PROVIDERS]
    return [[own.choices[0].message.content, own.choices[0].finish_reason] for own in answers]


@deed
def usage() -> Any:
    return [chat(provider).usage.completion_tokens for provider in PROVIDERS]


@deed
def stream() -> Any:
    saw = []
    for provider in PROVIDERS:
        chunks = list(chat(provider, stream=True, stream_options={"include_usage": True}))
        whole: Any = litellm.stream_chunk_builder(chunks, messages=ASK)
        choice = whole.choices[0]
        saw.append([choice.message.content, choice.finish_reason, whole.usage.completion_tokens])
    return saw


@deed
def at_once() -> Any:
    async def ask() -> Any:
        every = (litellm.acompletion(model=f"openai/{MODEL}", messages=ASK, **OWN) for _ in range(3))
        return await asyncio.gather(*every)

    return [own.choices[0].message.content for own in asyncio.run(ask())]


@deed
def tool_loop() -> Any:
    saw = []
    for provider in PROVIDERS:
        called = chat(provider, tools=[WEATHER]).choices[0]
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in called.message.tool_calls or []
        ]
        told = chat(provider, tools=[WEATHER], messages=[*ASK, called.message, *results]).choices[0].message.content
        saw.append([calls_of(called.message), called.finish_reason, told])
    return saw


@deed
def tool_stream() -> Any:
    chunks = list(chat("openai", tools=[WEATHER], stream=True))
    whole: Any = litellm.stream_chunk_builder(chunks, messages=ASK)
    return [calls_of(whole.choices[0].message), whole.choices[0].finish_reason]


@deed
def tool_choices() -> Any:
    named = {"type": "function", "function": {"name": "get_weather"}}
    return [
        calls_of(chat("openai", tools=[WEATHER], tool_choice=own).choices[0].message)
        for own in ("auto", "required", named, "none")
    ]


@deed
def typed() -> Any:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    saw = [json.loads(chat(own, response_format=form).choices[0].message.content) for own in PROVIDERS]
    loose = chat("openai", response_format={"type": "json_object"}, messages=[{"role": "user", "content": "JSON!"}])
    return [*saw, json.loads(loose.choices[0].message.content)]


@deed
def text_completion() -> Any:
    own: Any = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="Hello", max_tokens=8, **OWN)
    return own.choices[0].text


@deed
def over_responses() -> Any:
    made: Any = litellm.responses(model=f"openai/{MODEL}", input="Hi", temperature=0, **OWN)
    events: Any = litellm.responses(model=f"openai/{MODEL}", input="Hi", temperature=0, stream=True, **OWN)
    streamed = "".join(own.delta for own in events if own.type == "response.output_text.delta")
    return [made.output[0].content[0].text, streamed]


@deed
def over_messages() -> Any:
    own = {**OWN, "api_base": BASE.removesuffix("/v1")}
    made: Any = litellm.completion(model=f"anthropic/{MODEL}", messages=ASK, max_tokens=16, **own)
    called: Any = litellm.completion(model=f"anthropic/{MODEL}", messages=ASK, max_tokens=99, tools=[WEATHER], **own)
    return [made.choices[0].message.content, calls_of(called.choices[0].message), called.choices[0].finish_reason]


@deed
def refusal() -> Any:
    saw = []
    for fields in (
        {"temperature": 1000},
        {"model": "openai/nope"},
        {"messages": [{"role": "user", "content": "a" * 99999}]},
    ):
        try:
            litellm.completion(**{"model": f"openai/{MODEL}", "messages": ASK, **OWN, **fields})
        except Exception as error:
            saw.append(type(error).__name__)
    return saw


tell("litellm", "openai")
