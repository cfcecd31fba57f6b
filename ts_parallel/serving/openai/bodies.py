"""Request bodies, checked field by field. What leaves here is right, or a `RequestError` for this request alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from ts_parallel.config import did_you_mean
from ts_parallel.engine.request import GenerationParams
from ts_parallel.errors import RequestError
from ts_parallel.serving.exchange import RawRequest, echo
from ts_parallel.serving.text.forms import FORM_KINDS, Form, ResponseFormat, StrictModel, StructuredOutputs, forms_of
from ts_parallel.serving.text.model_files import SamplingDefaults
from ts_parallel.step_plan import SamplingParams

_NO_DEFAULTS = SamplingDefaults()
_MOST_STOPS = 16
_MOST_LOGPROBS = 20
_MOST_LEVELS = 200  # of objects and lists in one another: what reads them is recursive, ours and others'
# Below this the most likely token is as good as certain, so it is taken for 0, as vLLM does.
_LOWEST_TEMPERATURE = 1e-5
_PLAIN = {int, float, bool, type(None)}  # what neither is text nor holds any
_MOST_TOP_K = 2**31 - 1  # more than any vocabulary: all tokens

B = TypeVar("B", bound=StrictModel)


class _GenerationBody(StrictModel):
    """The fields that every way to generate has; names and meanings are OpenAI's where it has them, else vLLM's."""

    max_tokens: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    """Any whole number; it counts modulo 2**64."""
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    timeout: float | None = Field(default=None, gt=0)
    """Seconds, from when the request came."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(default=None, min_length=1)
    guided_grammar: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _biases_are_token_ids_with_numbers(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token_id, bias in (value or {}).items():
            if not re.fullmatch(r"\d{1,9}", token_id):
                raise ValueError(f"{token_id!r} is no token id")
            if not -100 <= bias <= 100:
                raise ValueError(f"the bias of token {token_id} is {bias}, not between -100 and 100")
        return value

    @field_validator("stop")
    @classmethod
    def _stops_are_few_and_not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > _MOST_STOPS:
            raise ValueError(f"{len(stops)} stop strings, at most {_MOST_STOPS} are looked for")
        if isinstance(value, list) and "" in value:
            raise ValueError("an empty stop string")
        return value

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens are wanted beside each of the answer's own; None: not even that."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens are to have log-probabilities."""
        return False

    def form(self) -> Form | None:
        """What the answer must be; None where it may be anything.

        Raises:
            RequestError: several forms, one that says too little, or a field that no form goes together with.
        """
        guided = {kind: getattr(self, f"guided_{kind}") for kind in FORM_KINDS}
        forms = forms_of(self.response_format, self.structured_outputs, guided)
        if len(forms) > 1:
            names = " and ".join(form.parameter for form in forms)
            raise RequestError(f"an answer has one form, got {names}", forms[1].parameter)
        for name in ("min_tokens", "ignore_eos"):
            if forms and getattr(self, name):
                raise RequestError(f"{name} cannot go on where the form of {forms[0].parameter} ends", name)
        return forms[0] if forms else None

    def stop_strings(self) -> tuple[str, ...]:
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or ()))

    def generation_params(
        self, temperature: float, random_seed: int, defaults: SamplingDefaults = _NO_DEFAULTS
    ) -> GenerationParams:
        sampling = SamplingParams(
            temperature=temperature if temperature >= _LOWEST_TEMPERATURE else 0.0,
            top_p=_or(self.top_p, defaults.top_p),
            seed=_or(self.seed, random_seed) % 2**64,
            top_k=min(max(0, _or(self.top_k, defaults.top_k)), _MOST_TOP_K),
            min_p=_or(self.min_p, defaults.min_p),
            typical_p=_or(self.typical_p, defaults.typical_p),
            repetition_penalty=_or(self.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items()),
            num_logprobs=self.num_logprobs,
        )
        return GenerationParams(
            max_tokens=self.max_tokens,
            sampling=sampling,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            priority=self.priority,
            scores_prompt=self.scores_prompt,
        )


def choice_params(params: GenerationParams, number: int) -> GenerationParams:
    """Those of a request's choice `number`: the first has the request's own seed, the others one that comes of it."""
    if number == 0:
        return params
    seed = int(np.random.SeedSequence((params.sampling.seed, number)).generate_state(1, np.uint64)[0])
    return replace(params, sampling=replace(params.sampling, seed=seed))


N = TypeVar("N", int, float)


def _or(value: N | None, default: N) -> N:
    return default if value is None else value


class NativeBody(_GenerationBody):
    """`POST /predictions/NAME`."""

    prompt: str
    temperature: float = Field(default=0.0, ge=0, le=100)
    stream: bool = True
    logprobs: int | None = Field(default=None, ge=0, le=_MOST_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class StreamOptions(StrictModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _OpenAIBody(_GenerationBody):
    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: int | None = Field(default=None, ge=1)
    best_of: int | None = Field(default=None, ge=1)

    @property
    def num_choices(self) -> int:
        """How many answers each prompt gets.

        Raises:
            RequestError: more are to be made than are to be sent.
        """
        wanted = self.n or 1
        if self.best_of not in (None, wanted):
            raise RequestError(
                f"best_of is {self.best_of}: every answer is sent, so it can only be n, {wanted}", "best_of"
            )
        return wanted


class CompletionBody(_OpenAIBody):
    """`POST v1/completions`: https://platform.openai.com/docs/api-reference/completions/create."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=_MOST_LOGPROBS)
    echo: bool | None = False

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more, each as text or as token ids."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            return prompt
        return [prompt]  # type: ignore[return-value]

    @model_validator(mode="after")
    def _no_tokens_are_wanted_only_of_a_prompt(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens is 0, which leaves nothing to answer without echo", "max_tokens")
        return self


# What apply_chat_template takes beside the variables of a template: fields of the body, or the server's own affair.
_NO_TEMPLATE_VARIABLES = (
    "add_generation_prompt",
    "chat_template",
    "conversation",
    "messages",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
)


class ChatBody(_OpenAIBody):
    """`POST v1/chat/completions`: https://platform.openai.com/docs/api-reference/chat/create."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=_MOST_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @model_validator(mode="after")
    def _top_logprobs_come_with_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs is {self.top_logprobs}, which needs logprobs to be true", "top_logprobs")
        return self

    @field_validator("messages")
    @classmethod
    def _messages_have_roles_and_texts(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for number, message in enumerate(value):
            if not isinstance(message.get("role"), str):
                raise ValueError(f"message {number} has no role")
            if not isinstance(message.get("content"), (str, list, type(None))):
                raise ValueError(f"the content of message {number} is neither a text nor a list of parts")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _kwargs_are_variables_of_the_template(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in value or {}:
            if name in _NO_TEMPLATE_VARIABLES:
                raise ValueError(f"{name!r} is no variable of the model's chat template")
        return value

    def template_messages(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them: parts of type text are joined.

        Raises:
            RequestError: a part is no text.
        """
        return [{**message, "content": _text_of(message.get("content"))} for message in self.messages]


def _text_of(content: str | list[Any] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"only parts of type 'text' can be read, got {echo(part)}", "messages")
        texts.append(part["text"])
    return "".join(texts)


class TokenizeBody(StrictModel):
    """`POST tokenize`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeBody(StrictModel):
    """`POST detokenize`."""

    tokens: list[int]
    model: str | None = None


# Fields of OpenAI's API that change nothing at these values and are refused at others.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
}


def parse_native(request: RawRequest) -> NativeBody:
    """A JSON object, or raw text that is the prompt."""
    if (text := request.text()) is not None:
        return _validated(NativeBody, {"prompt": text})
    return parse_plain(NativeBody, request)


def parse_completion(request: RawRequest) -> CompletionBody:
    return _parse_openai(CompletionBody, request)


def parse_chat(request: RawRequest) -> ChatBody:
    return _parse_openai(ChatBody, request)


def parse_plain(body: type[B], request: RawRequest) -> B:
    """A JSON object of the fields of `body`."""
    fields = request.fields()
    _refuse_unknown(fields, body)
    return _validated(body, fields)


def _parse_openai(body: type[B], request: RawRequest) -> B:
    fields = dict(request.fields())
    for name, neutral in _NEUTRAL.items():
        value = None if name in body.model_fields else fields.pop(name, None)
        if value is not None and value not in neutral:
            raise RequestError(f"{name!r} is not supported, got {echo(value)}", name)
    _refuse_unknown(fields, body)
    return _validated(body, fields)


def _refuse_unknown(fields: Mapping[str, Any], body: type[StrictModel]) -> None:
    for name in fields:
        if name not in body.model_fields:
            raise RequestError(f"unknown field {name!r}{did_you_mean(name, body.model_fields)}", str(name))


def _validated(body: type[B], fields: Mapping[str, Any]) -> B:
    for name, value in fields.items():
        _refuse_unreadable(value, name)
    try:
        return body(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        is_missing = first["type"] == "missing"
        place = _place(first["loc"], fields, is_missing)
        got = "" if is_missing else f", got {echo(first['input'])}"
        raise RequestError(f"{place}: {first['msg']}{got}", str(first["loc"][0]) if first["loc"] else None) from None


def _place(loc: Sequence[str | int], fields: Mapping[str, Any], is_missing: bool) -> str:
    """The way to an error: keys and indices without pydantic's own names for the members of a union."""
    value: Any = fields
    way: list[str] = []
    for at, part in enumerate(loc):
        if isinstance(value, dict) and (part in value or (is_missing and at == len(loc) - 1)):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            continue
        way.append(str(part))
    return ".".join(way) or "body"


def _refuse_unreadable(value: Any, parameter: str) -> None:
    """
    Raises:
        RequestError: a text somewhere in a field's value is none, though JSON can write it, or lies too deep.
    """
    level = [value]
    for _ in range(_MOST_LEVELS):
        texts = [own for own in level if isinstance(own, str)]
        if not all(map(_is_utf8, texts)):
            raise RequestError(f"{parameter}: half a surrogate pair, which is no character of any text", parameter)
        parts = [own for own in level if isinstance(own, (dict, list))]
        level = []
        for own in parts:
            inner = [*own, *own.values()] if isinstance(own, dict) else own
            if not set(map(type, inner)) <= _PLAIN:  # most are long lists of token ids
                level += inner
        if not level:
            return
    raise RequestError(f"{parameter}: more than {_MOST_LEVELS} levels of objects and lists", parameter)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
