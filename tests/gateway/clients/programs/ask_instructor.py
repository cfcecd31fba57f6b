"""instructor: typed answers in each of its modes that OpenAI's API has, whole, in parts and several."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import instructor
import openai
from pydantic import BaseModel, Field, field_validator
from telling import BASE, MODEL, deed, tell

ASK: Any = [{"role": "user", "content": "How is the weather in Paris?"}]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    degrees: int = Field(ge=-50, le=60)


class Days(BaseModel):
    """The weather of some days."""

    days: list[Weather] = Field(min_length=2, max_length=3)


class Checked(Weather):
    """The weather, of which the first is not believed."""

    refused: ClassVar[list[int]] = []

    @field_validator("degrees")
    @classmethod
    def _is_believed(cls, degrees: int) -> int:
        if not cls.refused:
            cls.refused.append(degrees)
            raise ValueError("not so")
        return degrees


def client(mode: instructor.Mode) -> Any:
    own = openai.OpenAI(base_url=BASE, api_key="none", max_retries=0, timeout=60)
    return instructor.from_openai(own, mode=mode)


def typed(mode: instructor.Mode) -> Any:
    made = client(mode).chat.completions.create(
        model=MODEL, messages=ASK, response_model=Weather, max_retries=0, temperature=0
    )
    assert isinstance(made, Weather)
    return [made.city, made.degrees]


@deed
def tools() -> Any:
    return typed(instructor.Mode.TOOLS)


@deed
def strict_tools() -> Any:
    return typed(instructor.Mode.TOOLS_STRICT)


@deed
def json() -> Any:
    return typed(instructor.Mode.JSON)


@deed
def json_schema() -> Any:
    return typed(instructor.Mode.JSON_SCHEMA)


@deed
def markdown_json() -> Any:
    return typed(instructor.Mode.MD_JSON)


@deed
def parts() -> Any:
    own = client(instructor.Mode.TOOLS).chat.completions
    pieces = list(own.create_partial(model=MODEL, messages=ASK, response_model=Weather, temperature=0))
    return [pieces[-1].city, pieces[-1].degrees]


@deed
def several() -> Any:
    made = client(instructor.Mode.TOOLS).chat.completions.create(
        model=MODEL, messages=ASK, response_model=Days, max_retries=0, temperature=0
    )
    return [[own.city, own.degrees] for own in made.days]


@deed
def asked_again() -> Any:
    """A first answer that its own check refuses goes back to the model with what was wrong."""
    own = client(instructor.Mode.TOOLS).chat.completions
    made = own.create(model=MODEL, messages=ASK, response_model=Checked, max_retries=2, temperature=0)
    return [made.city, len(Checked.refused)]


@deed
def with_completion() -> Any:
    own = client(instructor.Mode.TOOLS).chat.completions
    made, raw = own.create_with_completion(model=MODEL, messages=ASK, response_model=Weather, max_retries=0)
    return [made.city, raw.choices[0].finish_reason, raw.choices[0].message.tool_calls[0].function.name]


tell("instructor", "openai")
