"""Request bodies, checked field by field. What leaves here is right, or a `RequestError` for this request alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ts_parallel.config import did_you_mean
from ts_parallel.engine.request import GenerationParams
from ts_parallel.errors import RequestError
from ts_parallel.runtime.step import SamplingParams

_LONGEST_ECHO = 60  # characters of a bad value that an error repeats


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


B = TypeVar("B", bound=_Body)


class _GenerationBody(_Body):
    max_tokens: int | None = Field(default=None, ge=1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**64)

    def generation_params(self, temperature: float, random_seed: int, ignore_eos: bool = False) -> GenerationParams:
        seed = random_seed if self.seed is None else self.seed
        return GenerationParams(self.max_tokens, SamplingParams(temperature, self.top_p, seed), ignore_eos)


class NativeBody(_GenerationBody):
    """`POST /predictions/NAME`."""

    prompt: str
    temperature: float = Field(default=0.0, ge=0, le=100)
    stream: bool = True


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class CompletionBody(_GenerationBody):
    """`POST v1/completions`: https://platform.openai.com/docs/api-reference/completions/create."""

    prompt: str | list[int] | list[str] | list[list[int]]
    model: str | None = None
    max_tokens: int | None = Field(default=16, ge=1)
    temperature: float | None = Field(default=1.0, ge=0, le=100)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: str | None = None

    def single_prompt(self) -> str | list[int]:
        """The prompt, taken out of a list of one."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise RequestError(f"{len(prompt)} prompts in one request; send one request a prompt", "prompt")
            return prompt[0]
        return prompt  # type: ignore[return-value]


# Fields of OpenAI's API that change nothing at these values and are refused at others.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "n": (1,),
    "presence_penalty": (0,),
    "stop": ([], ""),
    "suffix": ("",),
}


@dataclass(frozen=True)
class RawRequest:
    """One request as TorchServe hands it over: a route (`v1/completions`, empty for the model's own URL) and a body.

    The body is parsed already where it was called JSON and is, else bytes or text, or None where there was none.
    """

    route: str
    body: Any
    content_type: str

    def text(self) -> str | None:
        """The body as raw text; None where it is JSON.

        Raises:
            RequestError: it is a form, which TorchServe has taken apart, or no text.
        """
        if "x-www-form-urlencoded" in self.content_type:
            raise RequestError("the body came as a form; send it with 'Content-Type: application/json' or 'text/plain'")
        if "json" in self.content_type or not isinstance(self.body, (bytes, bytearray, str)):
            return None
        try:
            text = self.body if isinstance(self.body, str) else bytes(self.body).decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"the body is neither JSON nor UTF-8 text: {error}") from None
        return None if text.lstrip().startswith("{") else text

    def fields(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            RequestError: it is none.
        """
        value = self.body
        if isinstance(value, (bytes, bytearray, str)):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"the body is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise RequestError(f"the body must be a JSON object, got {_echo(value)}")
        return value


def parse_native(request: RawRequest) -> NativeBody:
    """A JSON object, or raw text that is the prompt."""
    if (text := request.text()) is not None:
        return NativeBody(prompt=text)
    fields = request.fields()
    _refuse_unknown(fields, NativeBody)
    return _validated(NativeBody, fields)


def parse_completion(request: RawRequest) -> CompletionBody:
    fields = dict(request.fields())
    for name, neutral in _NEUTRAL.items():
        value = fields.pop(name, None)
        if value is not None and value not in neutral:
            raise RequestError(f"{name!r} is not supported, got {_echo(value)}", name)
    _refuse_unknown(fields, CompletionBody)
    return _validated(CompletionBody, fields)


def _refuse_unknown(fields: Mapping[str, Any], body: type[_Body]) -> None:
    for name in fields:
        if name not in body.model_fields:
            raise RequestError(f"unknown field {name!r}{did_you_mean(name, body.model_fields)}", str(name))


def _validated(body: type[B], fields: Mapping[str, Any]) -> B:
    try:
        return body(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else None
        got = "" if first["type"] == "missing" else f", got {_echo(first['input'])}"
        raise RequestError(f"{name}: {first['msg']}{got}", name) from None


def _echo(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_ECHO else text[:_LONGEST_ECHO] + "…"
