"""Request bodies, checked field by field. What leaves here is right, or a `RequestError` for this request alone."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import Field, WrapValidator, model_validator

from ts_parallel.errors import RequestError
from ts_parallel.serving.chat.tools import Offer, offer_of
from ts_parallel.serving.exchange import RawRequest
from ts_parallel.serving.openai.fields.conversation import ConversationBody
from ts_parallel.serving.openai.fields.foreign import ForeignFields
from ts_parallel.serving.openai.fields.generation import MOST_LOGPROBS, GenerationBody
from ts_parallel.serving.openai.fields.messages import plain_messages
from ts_parallel.serving.openai.fields.reading import in_parts, validated
from ts_parallel.serving.text.forms import FIRST_COUNTS, Numbers, StrictModel, Texts

B = TypeVar("B", bound=StrictModel)


class NativeBody(GenerationBody):
    """`POST /predictions/NAME`."""

    prompt: str
    temperature: float = Field(default=0.0, ge=0, le=100)
    stream: bool = True
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    add_special_tokens: bool = True

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class StreamOptions(StrictModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False
    """Letters without a meaning that make chunks alike long; there are none here."""


class _OpenAIBody(GenerationBody):
    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(default=None, ge=-1)
    n: int | None = Field(default=None, ge=1)
    best_of: int | None = Field(default=None, ge=1)

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

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

    prompt: Annotated[str | Numbers | Texts | Annotated[list[Numbers], FIRST_COUNTS], WrapValidator(in_parts)]
    max_tokens: int | None = Field(default=16, ge=-1)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = False
    add_special_tokens: bool = True

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        return super().scores_prompt or (bool(self.echo) and self.logprobs is not None)

    @property
    def can_be_empty(self) -> bool:
        return bool(self.echo)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more, each as text or as token ids."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            return prompt
        return [prompt]  # type: ignore[return-value]


class ChatBody(ConversationBody, _OpenAIBody):
    """`POST v1/chat/completions`: https://platform.openai.com/docs/api-reference/chat/create."""

    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @model_validator(mode="after")
    def _top_logprobs_come_with_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs is {self.top_logprobs}, which needs logprobs to be true", "top_logprobs")
        return self

    def offer(self) -> Offer | None:
        """The tools that may be called; None where none may.

        Raises:
            RequestError: a tool is none, or the choice is none of them.
        """
        return offer_of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def continued_text(self) -> str | None:
        """The last message's, where the answer goes on with it."""
        last = self.messages[-1]
        if self.begins_an_answer or last["role"] != "assistant":
            return None
        text: str | None = plain_messages([last])[0]["content"]
        return text


class TokenizeBody(StrictModel):
    """`POST tokenize` of a text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatBody(ConversationBody):
    """`POST tokenize` of a conversation."""

    model: str | None = None
    return_token_strs: bool = False


class DetokenizeBody(StrictModel):
    """`POST detokenize`."""

    tokens: Annotated[Numbers, WrapValidator(in_parts)]
    model: str | None = None


def parse_native(request: RawRequest, foreign: ForeignFields | None = None) -> NativeBody:
    """A JSON object, or raw text that is the prompt."""
    if (text := request.text()) is not None:
        return validated(NativeBody, {"prompt": text})
    return parse_plain(NativeBody, request, foreign)


def parse_completion(request: RawRequest, foreign: ForeignFields | None = None) -> CompletionBody:
    return parse_plain(CompletionBody, request, foreign)


def parse_chat(request: RawRequest, foreign: ForeignFields | None = None) -> ChatBody:
    return parse_plain(ChatBody, request, foreign)


def parse_tokenize(request: RawRequest, foreign: ForeignFields | None = None) -> TokenizeBody | TokenizeChatBody:
    """Of messages where there are any."""
    if request.fields().get("messages") is not None:
        return parse_plain(TokenizeChatBody, request, foreign)
    return parse_plain(TokenizeBody, request, foreign)


def parse_plain(body: type[B], request: RawRequest, foreign: ForeignFields | None = None) -> B:
    """A JSON object of the fields of `body`, and of others that pass."""
    fields = (foreign or ForeignFields()).without(body, request.fields())
    return validated(body, fields)
