"""LangChain's ChatOpenAI: answers, streams, tools, typed answers by all three methods, responses, plain completions."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field, SecretStr
from telling import BASE, MODEL, deed, tell

KEY = SecretStr("none")
chat = ChatOpenAI(model=MODEL, base_url=BASE, api_key=KEY, temperature=0, max_retries=0, timeout=60)
responses = ChatOpenAI(
    model=MODEL, base_url=BASE, api_key=KEY, temperature=0, max_retries=0, timeout=60, use_responses_api=True
)
QUESTION = "How is the weather in Paris?"


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: int = Field(ge=-50, le=60)


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def calls_of(message: Any) -> list[Any]:
    return [[call["name"], call["args"]] for call in message.tool_calls]


@deed
def invoke() -> Any:
    message = chat.invoke([SystemMessage("Be brief."), HumanMessage("Hi")])
    usage: Any = message.usage_metadata
    return [message.content, message.response_metadata["finish_reason"], usage["output_tokens"]]


@deed
def stream() -> Any:
    whole: Any = None
    for piece in chat.stream("Hi", stream_usage=True):
        whole = piece if whole is None else whole + piece
    return [whole.content, whole.response_metadata["finish_reason"], whole.usage_metadata["output_tokens"]]


@deed
def at_once() -> Any:
    async def ask() -> list[Any]:
        return await chat.abatch(["Hi", "Ho", "Ha"])

    return [message.content for message in asyncio.run(ask())]


@deed
def logprobs() -> Any:
    metadata = chat.bind(logprobs=True, top_logprobs=2).invoke("Hi").response_metadata
    return "".join(own["token"] for own in metadata["logprobs"]["content"])


@deed
def tool_loop() -> Any:
    with_tools = chat.bind_tools([get_weather])
    messages: list[Any] = [HumanMessage(QUESTION)]
    called = with_tools.invoke(messages)
    results = [get_weather.invoke(call) for call in called.tool_calls]
    assert all(isinstance(own, ToolMessage) for own in results)
    told = with_tools.invoke([*messages, called, *results])
    return [calls_of(called), called.response_metadata["finish_reason"], told.content]


@deed
def tool_stream() -> Any:
    whole: Any = None
    for piece in chat.bind_tools([get_weather], parallel_tool_calls=False).stream(QUESTION):
        whole = piece if whole is None else whole + piece
    return [calls_of(whole), whole.response_metadata["finish_reason"]]


@deed
def tool_choices() -> Any:
    choices: list[Any] = ["any", "required", "get_weather", True, "none"]
    return [calls_of(chat.bind_tools([get_weather], tool_choice=own).invoke("Hi")) for own in choices]


@deed
def strict_tool() -> Any:
    return calls_of(chat.bind_tools([get_weather], strict=True, tool_choice="any").invoke(QUESTION))


def typed(method: Any, model: ChatOpenAI = chat, **options: Any) -> Any:
    made: Any = model.with_structured_output(Weather, method=method, **options).invoke(f"{QUESTION} Answer in JSON.")
    assert isinstance(made, Weather), made
    return [made.city, made.degrees]


@deed
def structured_function_calling() -> Any:
    return typed("function_calling")


@deed
def structured_json_schema() -> Any:
    return [typed("json_schema"), typed("json_schema", strict=True)]


@deed
def structured_json_mode() -> Any:
    return typed("json_mode")


@deed
def structured_stream() -> Any:
    typed_chat: Any = chat.with_structured_output(Weather.model_json_schema(), method="json_schema")
    return list(typed_chat.stream(f"{QUESTION} Answer in JSON."))[-1]


@deed
def over_responses() -> Any:
    answered: Any = responses.invoke("Hi")
    streamed = "".join(piece.text for piece in responses.stream("Hi"))
    with_tools = responses.bind_tools([get_weather])
    called = with_tools.invoke(QUESTION)
    told: Any = with_tools.invoke([HumanMessage(QUESTION), called, *map(get_weather.invoke, called.tool_calls)])
    return [answered.text, streamed, calls_of(called), told.text, typed("json_schema", responses)]


@deed
def completion() -> Any:
    plain = OpenAI(model=MODEL, base_url=BASE, api_key=KEY, temperature=0, max_retries=0, timeout=60, max_tokens=8)
    return [plain.invoke("Hello"), "".join(plain.stream("Hello"))]


tell("langchain-openai", "langchain-core", "openai")
