"""A model's chat template: how it wants messages, and the prompt that it makes of them.

Templates differ in what they read: `content` as a text or as a list of parts, arguments as an object or as its JSON,
`developer` or only `system`. Each is asked once, by rendering small conversations with words that occur nowhere else.
And each prompt is looked at: a template that leaves a message out would have the model answer something else than was
asked, with nobody told.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers.utils.chat_template_utils import render_jinja_template

from ts_parallel.errors import RequestError
from ts_parallel.serving.openai.fields.messages import Message
from ts_parallel.serving.openai.templates.sandbox import Budget, TakesLongError, TemplateBoundError, bounded

logger = logging.getLogger(__name__)

_WORD, _KEY = "qzword", "qzkey"  # of probes
_CALL: Mapping[str, Any] = {
    "id": "qzcall001",  # nine letters: Mistral's templates take no others
    "type": "function",
    "function": {"name": "qzcalled", "arguments": {"qzkey": "1"}},
}
_ASKS_FOR_NONE = re.compile(r"content['\"]?\]?\s*(?:is|==|!=)\s*(?:not\s+)?none", re.IGNORECASE)
_PRINTED_PART = re.compile(rf"""['"]text['"]: ?['"]{_WORD}['"]""")
# Where what a model has thought ends; templates leave it out of earlier turns.
_ENDS_OF_THOUGHT = (
    "</think>",
    "[/THINK]",
    "</thinking>",
    "</reasoning>",
    "</seed:think>",
    "<|channel|>final<|message|>",
)
_LONGEST_REASON = 500
# Of processor time, for a rendering that others wait for, and for one in a thread of its own.
_SECONDS_AT_ONCE, _MOST_SECONDS = 0.05, 2.0
# A prompt, and each text on the way to it, may be longer than what it is made of.
_MOST_LETTERS, _TIMES_ITS_INPUT = 1 << 20, 4

Content = Literal["text", "parts"]


@dataclass(frozen=True)
class _Calls:
    """How a template wants a message with tool calls."""

    is_json: bool = False
    """Arguments as text, and not as an object."""
    silence: str | None = ""
    """The content of a message that has nothing but calls."""
    are_alone: bool = False
    """Whether it shows no calls beside a text."""


@dataclass
class _Habits:
    """What is known of one template."""

    source: str
    contents: dict[str, Content] = field(default_factory=dict)
    """By role."""
    calls: _Calls | None = None

    def role(self, role: str) -> str:
        return "system" if role == "developer" and "developer" not in self.source else role


class ChatTemplate:
    """A tokenizer's. Owns what is known of each of its templates; several threads may ask."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._habits: dict[str, _Habits] = {}
        self._has_told = False
        self._is_quick: bool | None = None
        """None as long as nobody has seen; False for good."""

    @property
    def takes_long(self) -> bool:
        """Whether nobody is to be kept waiting by it."""
        return bool(self._tokenizer.chat_template) and not self._is_quick

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt.

        Args:
            messages: as `plain_messages` has them.
            variables: the template's own.

        Raises:
            RequestError: there is no template, it refuses the messages, takes more time or memory than it may, or it
                would leave one of them out.
            TakesLongError: it was thought to be quick and is not: to be called again, where nobody waits.
        """
        if not self._tokenizer.chat_template:
            raise RequestError("the model's tokenizer has no chat template; use v1/completions", "messages")
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        habits = self._habits_of(tools)
        budget = self._budget(_letters_of([messages, tools, variables]))
        try:
            with bounded(budget):
                shaped = [self._shape(message, habits) for message in messages]
                prompt = self._apply(habits.source, shaped, list(tools or ()) or None, {**options, **(variables or {})})
        except TakesLongError:
            self._is_quick = False
            raise
        except Exception as error:  # a template is a program of the model's own, and refuses by raising what it likes
            reason = str(error)[:_LONGEST_REASON]
            raise RequestError(f"the model's chat template refuses the messages: {reason}", "messages") from None
        if self._is_quick is None and budget.seconds_taken < _SECONDS_AT_ONCE / 5:
            self._is_quick = True
        self._refuse_loss(messages, prompt)
        return prompt

    def _budget(self, num_letters: int) -> Budget:
        most = _MOST_LETTERS + _TIMES_ITS_INPUT * num_letters
        return Budget(_SECONDS_AT_ONCE, most, TakesLongError) if self._is_quick else Budget(_MOST_SECONDS, most)

    def _apply(
        self, source: str, messages: Sequence[Message], tools: list[Any] | None, options: Mapping[str, Any]
    ) -> str:
        tokenizer = self._tokenizer
        if all(message.get("content") is not None for message in messages):
            text: str = tokenizer.apply_chat_template(
                list(messages), tools=tools, chat_template=source, tokenize=False, **options
            )
            return text
        # transformers' own takes every None away, by which a template may know a message of nothing but calls.
        (text,), _ = render_jinja_template(
            [list(messages)], tools, chat_template=source, **{**tokenizer.special_tokens_map, **options}
        )
        return text

    def _habits_of(self, tools: Sequence[Mapping[str, Any]] | None) -> _Habits:
        """Of the template that counts: a tokenizer may have another one for tools."""
        source = str(self._tokenizer.get_chat_template(None, list(tools or ()) or None))
        if source not in self._habits:
            self._habits[source] = _Habits(source)
        return self._habits[source]

    def _shape(self, message: Message, habits: _Habits) -> Message:
        """A message as this template wants it."""
        shaped = {**message, "role": habits.role(message["role"])}
        if "tool_calls" in shaped:
            wants = self._calls_of(habits)
            if wants.is_json:
                shaped["tool_calls"] = [_with_json(call) for call in shaped["tool_calls"]]
            if not shaped["content"] or wants.are_alone:
                shaped["content"] = wants.silence
                return shaped
        shaped["content"] = self._content(shaped["role"], shaped["content"], habits)
        return shaped

    def _content(self, role: str, text: str, habits: _Habits) -> Any:
        """A text as the template reads what this role says: in parts only where it shows no text."""
        if role not in habits.contents:
            shown = self._prompt_of(self._probe(role, _WORD, habits), habits)
            in_parts = self._prompt_of(self._probe(role, _in_parts(_WORD), habits), habits)
            has_parts = _WORD in in_parts and not _PRINTED_PART.search(in_parts)
            habits.contents[role] = "parts" if _WORD not in shown and has_parts else "text"
        return _in_parts(text) if habits.contents[role] == "parts" else text

    def _probe(self, role: str, content: Any, habits: _Habits) -> list[Message]:
        """A small conversation in which this role says so."""
        said: Message = {"role": role, "content": content}
        if role == "user":
            return [said]
        user: Message = {"role": "user", "content": self._content("user", "x", habits)}
        if role == "assistant":
            return [user, said]
        if role == "tool":
            wants = self._calls_of(habits)
            call = _with_json(_CALL) if wants.is_json else _CALL
            calls = {"role": "assistant", "content": wants.silence, "tool_calls": [call]}
            return [user, calls, {**said, "tool_call_id": _CALL["id"], "name": _CALL["function"]["name"]}]
        return [said, user]

    def _calls_of(self, habits: _Habits) -> _Calls:
        """Arguments are objects where the template shows them as such, as transformers' pages have it."""
        if habits.calls is None:
            silences = (None, "") if _ASKS_FOR_NONE.search(habits.source) else ("",)
            every = [_Calls(is_json, silence) for silence in silences for is_json in (False, True)]
            found = next((own for own in every if self._shows_calls(own, own.silence, habits)), _Calls())
            has_any = self._shows_calls(found, found.silence, habits)
            are_alone = has_any and not self._shows_calls(found, _WORD, habits)
            habits.calls = replace(found, are_alone=are_alone)
        return habits.calls

    def _shows_calls(self, wants: _Calls, content: str | None, habits: _Habits) -> bool:
        """Whether calls show as JSON or in a notation of the template's own, and not as Python prints them."""
        call = _with_json(_CALL) if wants.is_json else _CALL
        user: Message = {"role": "user", "content": self._content("user", "x", habits)}
        prompt = self._prompt_of([user, {"role": "assistant", "content": content, "tool_calls": [call]}], habits)
        if content is None and "None" in prompt:
            return False
        return (f'"{_KEY}"' if wants.is_json else _KEY) in prompt and f"'{_KEY}'" not in prompt

    def _prompt_of(self, probe: Sequence[Message], habits: _Habits) -> str:
        """Empty where the template refuses it."""
        try:
            return self._apply(habits.source, probe, None, {"add_generation_prompt": False})
        except (TakesLongError, TemplateBoundError):  # by which nothing is known of it
            raise
        except Exception:  # whatever it is
            return ""

    def _refuse_loss(self, messages: Sequence[Message], prompt: str) -> None:
        """
        Raises:
            RequestError: the prompt lacks the text of a message, or a tool call.
        """
        shown = _Shown(prompt)
        for number, message in enumerate(messages):
            role, text = message["role"], message["content"] or ""
            if role == "assistant":
                text = _said(text)
            if not shown.has(text):
                if "tool_calls" in message:  # many templates show the calls alone, as their models were trained
                    self._tell()
                    continue
                raise RequestError(f"the model's chat template leaves out message {number} (role {role!r})", "messages")
            for call in message.get("tool_calls", ()):
                if not shown.has(name := call["function"]["name"]):
                    raise RequestError(
                        f"the model's chat template leaves out the call of {name!r} in message {number}", "messages"
                    )

    def _tell(self) -> None:
        if not self._has_told:
            self._has_told = True
            logger.warning("the model's chat template leaves out what an assistant says beside its tool calls")


class _Shown:
    """A prompt in which texts are looked for, mostly one behind the other."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._at = 0
        self._bare: str | None = None

    def has(self, text: str) -> bool:
        """Whether a text is there, be it trimmed, its white space altered, or written as JSON writes it."""
        text = text.strip()
        at = self._prompt.find(text, self._at)
        if at >= 0:
            self._at = at + len(text)
            return True
        if text in self._prompt:
            return True
        if self._bare is None:
            self._bare = _bare(self._prompt)
        ways = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
        return any(_bare(way) in self._bare for way in ways)


def _letters_of(value: Any) -> int:
    """Of all texts in it, wherever they are."""
    count, left = 0, [value]
    while left:
        own = left.pop()
        if isinstance(own, str):
            count += len(own)
        elif isinstance(own, Mapping):
            left += [*own, *own.values()]
        elif isinstance(own, (list, tuple)):
            left += own
    return count


def _bare(text: str) -> str:
    return "".join(text.split())


def _said(text: str) -> str:
    """What an assistant said after it had thought."""
    for end in _ENDS_OF_THOUGHT:
        text = text.rpartition(end)[2]
    return text


def _in_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _with_json(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with its arguments as JSON."""
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
