"""pydantic-ai: agents over chat completions, responses and messages; tools, typed output in each way, streams."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from telling import BASE, MODEL, deed, tell

provider = OpenAIProvider(base_url=BASE, api_key="none")
chat = OpenAIChatModel(MODEL, provider=provider)
responses = OpenAIResponsesModel(MODEL, provider=provider)
SETTINGS: Any = {"temperature": 0, "timeout": 60}
QUESTION = "How is the weather in Paris?"


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: int = Field(ge=-50, le=60)


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def agent(model: Any = chat, **options: Any) -> Any:
    return Agent(model, model_settings=SETTINGS, retries=0, **options)


def typed(way: Any, model: Any = chat, question: str = QUESTION) -> Any:
    made = agent(model, output_type=way).run_sync(question).output
    assert isinstance(made, Weather)
    return [made.city, made.degrees]


def parts_of(result: Any) -> list[str]:
    return [part.part_kind for message in result.all_messages() for part in message.parts]


@deed
def run() -> Any:
    result = agent(instructions="Be brief.").run_sync("Hi")
    return [result.output, result.usage.output_tokens]


@deed
def stream() -> Any:
    async def ask() -> list[str]:
        async with agent().run_stream("Hi") as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    return "".join(asyncio.run(ask()))


@deed
def tool_loop() -> Any:
    result = agent(tools=[get_weather]).run_sync(QUESTION)
    return [result.output, parts_of(result)]


@deed
def tool_loop_streamed() -> Any:
    async def ask() -> Any:
        async with agent(tools=[get_weather]).run_stream(QUESTION) as result:
            text = await result.get_output()
        return [text, parts_of(result)]

    return asyncio.run(ask())


@deed
def typed_output() -> Any:
    return typed(Weather)


@deed
def tool_output() -> Any:
    return typed(ToolOutput(Weather, name="weather", strict=True))


@deed
def native_output() -> Any:
    return typed(NativeOutput(Weather))


@deed
def prompted_output() -> Any:
    return typed(PromptedOutput(Weather))


@deed
def typed_stream() -> Any:
    async def ask() -> Any:
        async with agent(output_type=Weather).run_stream(QUESTION) as result:
            return await result.get_output()

    made = asyncio.run(ask())
    return [made.city, made.degrees]


@deed
def over_responses() -> Any:
    text = agent(responses).run_sync("Hi").output
    result = agent(responses, tools=[get_weather]).run_sync(QUESTION)
    return [text, result.output, typed(Weather, responses), typed(NativeOutput(Weather), responses)]


tell("pydantic-ai-slim", "openai")
