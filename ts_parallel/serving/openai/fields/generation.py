"""The fields that every way to generate has, and what the engine is asked for by them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field, WrapValidator, field_validator, model_validator

from ts_parallel.engine.request import GenerationParams
from ts_parallel.errors import RequestError
from ts_parallel.serving.openai.fields.reading import of_numbers
from ts_parallel.serving.openai.fields.token_details import Wanted
from ts_parallel.serving.text.forms import (
    FORM_KINDS,
    Form,
    Numbers,
    ResponseFormat,
    StrictModel,
    StructuredOutputs,
    Texts,
    forms_of,
)
from ts_parallel.serving.text.model_files import SamplingDefaults
from ts_parallel.step_plan import SamplingParams

_NO_DEFAULTS = SamplingDefaults()
MOST_STOPS = 256
LONGEST_STOPS = 4096  # characters of all together: each is looked for in what every token brings
MOST_BAD_WORDS = 256
LONGEST_BAD_WORDS = 4096
MOST_LOGPROBS = 20
# Below this the most likely token is as good as certain, so it is taken for 0, as vLLM does.
_LOWEST_TEMPERATURE = 1e-5
_MOST_TOP_K = 2**31 - 1  # more than any vocabulary: all tokens
_ALL_THERE_IS_ROOM_FOR = -1

N = TypeVar("N", int, float)


class GenerationBody(StrictModel):
    """Names and meanings are OpenAI's where it has them, else vLLM's."""

    max_tokens: int | None = Field(default=None, ge=-1)
    """-1, as None: as many as there is room for."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    do_sample: bool | None = None
    """False: greedy, as transformers has it."""
    logit_bias: Annotated[dict[str, float] | None, WrapValidator(of_numbers)] = None
    allowed_token_ids: Numbers | None = Field(default=None, min_length=1)
    bad_words: Texts | None = None
    seed: int | None = None
    """Any whole number; it counts modulo 2**64."""
    stop: str | Texts | None = None
    stop_token_ids: Numbers | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    """So many of the prompt's last tokens count; -1: as many as leave room for the answer."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    return_token_ids: bool = False
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    timeout: float | None = Field(default=None, gt=0)
    """Seconds, from when the request came."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = Field(default=None, min_length=1)
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
        _refuse_many(stops, "stop strings", MOST_STOPS, LONGEST_STOPS)
        if isinstance(value, list) and "" in value:
            raise ValueError("an empty stop string")
        return value

    @field_validator("bad_words")
    @classmethod
    def _bad_words_are_few_and_not_empty(cls, value: list[str] | None) -> list[str] | None:
        _refuse_many(value or [], "bad words", MOST_BAD_WORDS, LONGEST_BAD_WORDS)
        if value is not None and any(not word.strip() for word in value):
            raise ValueError("an empty bad word")
        return value

    @model_validator(mode="after")
    def _an_answer_has_a_token(self) -> GenerationBody:
        if self.most_tokens == 0 and not self.can_be_empty:
            raise RequestError(
                "max_tokens: Input should be greater than or equal to 1 (without echo), or -1 for all there is room "
                "for, got 0",
                "max_tokens",
                "invalid_value",
            )
        return self

    @property
    def most_tokens(self) -> int | None:
        """Of the answer, under whichever of its names it is said."""
        return self.max_tokens

    @property
    def can_be_empty(self) -> bool:
        """Whether there is anything to answer without a token."""
        return False

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens are wanted beside each of the answer's own; None: not even that."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens are to have log-probabilities."""
        return self.prompt_logprobs is not None

    def details(self, is_chat: bool) -> Wanted:
        return Wanted(self.return_token_ids, self.prompt_logprobs, is_chat)

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
        for form in forms:
            self.refuse_to_go_on_behind(form)
        return forms[0] if forms else None

    def refuse_to_go_on_behind(self, form: Form) -> None:
        """
        Raises:
            RequestError: the answer is to go on where its form ends.
        """
        for name in ("min_tokens", "ignore_eos"):
            if getattr(self, name):
                raise RequestError(f"{name} cannot go on where the form of {form.parameter} ends", name)

    def stop_strings(self) -> tuple[str, ...]:
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or ()))

    def truncated(self, prompt_ids: list[int], max_model_len: int) -> list[int]:
        """The last of a prompt's tokens, as many as `truncate_prompt_tokens` says."""
        most = self.truncate_prompt_tokens
        if most is None:
            return prompt_ids
        if most == -1:
            wanted = 1 if self.most_tokens in (None, _ALL_THERE_IS_ROOM_FOR) else self.most_tokens
            most = max(1, max_model_len - (wanted or 0))
        return prompt_ids[max(0, len(prompt_ids) - most) :]

    def generation_params(
        self,
        temperature: float,
        random_seed: int,
        defaults: SamplingDefaults = _NO_DEFAULTS,
        clamps_max_tokens: bool = False,
    ) -> GenerationParams:
        is_greedy = temperature < _LOWEST_TEMPERATURE or self.top_p == 0 or self.do_sample is False
        sampling = SamplingParams(
            temperature=0.0 if is_greedy else temperature,
            top_p=_or(self.top_p, defaults.top_p) or 1.0,
            seed=_or(self.seed, random_seed) % 2**64,
            top_k=min(max(0, _or(self.top_k, defaults.top_k)), _MOST_TOP_K),
            min_p=_or(self.min_p, defaults.min_p),
            typical_p=_or(self.typical_p, defaults.typical_p),
            repetition_penalty=_or(self.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items()),
            num_logprobs=_most(self.num_logprobs, self.prompt_logprobs),
        )
        return GenerationParams(
            max_tokens=None if self.most_tokens == _ALL_THERE_IS_ROOM_FOR else self.most_tokens,
            sampling=sampling,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            priority=self.priority,
            scores_prompt=self.scores_prompt,
            clamps_max_tokens=clamps_max_tokens,
        )


def choice_params(params: GenerationParams, number: int) -> GenerationParams:
    """Those of a request's choice `number`: the first has the request's own seed, the others one that comes of it."""
    if number == 0:
        return params
    seed = int(np.random.SeedSequence((params.sampling.seed, number)).generate_state(1, np.uint64)[0])
    return replace(params, sampling=replace(params.sampling, seed=seed))


def _refuse_many(texts: list[str], what: str, most: int, longest: int) -> None:
    if len(texts) > most:
        raise ValueError(f"{len(texts)} {what}, at most {most} are looked for")
    if (length := sum(map(len, texts))) > longest:
        raise ValueError(f"{what} of {length} characters in all, at most {longest} are looked for")


def _or(value: N | None, default: N) -> N:
    return default if value is None else value


def _most(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)
