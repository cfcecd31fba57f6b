"""The fields that make a prompt of messages: those of a chat, which `tokenize` has too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WrapValidator, field_validator, model_validator

from ts_parallel.errors import RequestError
from ts_parallel.serving.openai.fields.reading import in_parts
from ts_parallel.serving.text.forms import Objects, StrictModel

# What apply_chat_template takes beside the variables of a template: fields of the body, or the server's own affair.
_NO_TEMPLATE_VARIABLES = (
    "add_generation_prompt",
    "chat_template",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
)


class Thinking(StrictModel):
    """Whether the model is to think; the names are Anthropic's."""

    type: Literal["enabled", "disabled"]


class ConversationBody(StrictModel):
    """What a chat template is told."""

    messages: Annotated[Objects, WrapValidator(in_parts)] = Field(min_length=1)
    tools: Objects | None = None
    add_generation_prompt: bool | None = None
    """Whether the prompt ends where an answer begins; by default unless the last message is to be gone on with."""
    continue_final_message: bool = False
    add_special_tokens: bool = False
    """Whether the tokenizer adds those with which it begins a text; most templates bring their own."""
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(default=None, max_length=32)
    enable_thinking: bool | None = None
    thinking: Thinking | None = None
    verbosity: str | None = Field(default=None, max_length=32)
    documents: Objects | None = None

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

    @model_validator(mode="after")
    def _a_message_that_goes_on_is_no_new_one(self) -> ConversationBody:
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message goes on with the last message, add_generation_prompt begins another: set one",
                "continue_final_message",
            )
        return self

    @property
    def begins_an_answer(self) -> bool:
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    def template_variables(self) -> dict[str, Any]:
        """Those of the template; one that knows none of a name does as if it were not there."""
        thinks = self.enable_thinking
        if thinks is None and self.thinking is not None:
            thinks = self.thinking.type == "enabled"
        if thinks is None and self.reasoning_effort == "none":
            thinks = False
        named = {
            "reasoning_effort": self.reasoning_effort,
            "enable_thinking": thinks,
            "verbosity": self.verbosity,
            "documents": self.documents or None,
        }
        return {name: value for name, value in named.items() if value is not None} | (self.chat_template_kwargs or {})
