"""Messages as clients send them → as chat templates are written for: one text each, no nulls, tool calls as objects.

Templates are programs of each model's own, but written for one shape, that of transformers' pages: what OpenAI's
clients send besides (nulls, empty lists, parts under several names, JSON inside a text) is made that shape here.
Knows no template: what only one of them wants is `chat_template.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ts_parallel.errors import RequestError
from ts_parallel.serving.exchange import echo
from ts_parallel.serving.openai.fields.reading import refuse_unreadable

Message = dict[str, Any]

# Type of a part → the field that has its text.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# What a model has thought: templates read it beside the text, or leave it out of earlier turns.
_THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text"}


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The same conversation. `content` is a text, or None where a message has but tool calls.

    Raises:
        RequestError: a part is no text, or a message is of a shape that none of OpenAI's has.
    """
    return [_plain(message, f"message {number}") for number, message in enumerate(messages)]


def _plain(message: Mapping[str, Any], place: str) -> Message:
    plain = {name: value for name, value in message.items() if value is not None and name != "function_call"}
    if plain.get("audio"):
        raise RequestError(f"{place} has audio: this model reads text only", "messages")
    thoughts: list[str] = []
    content = _text(plain.pop("content", None), place, thoughts)
    if refusal := plain.pop("refusal", None):  # which the assistant said in place of a text
        content = content or str(refusal)
    calls = _calls(plain.pop("tool_calls", None) or [], place)
    if not calls and isinstance(old := message.get("function_call"), Mapping):
        calls = _calls([{"type": "function", "function": old}], place)
    if plain.get("role") == "function":  # of the same time as function_call
        plain["role"] = "tool"
    if thoughts and not plain.get("reasoning_content"):
        plain["reasoning_content"] = "\n".join(thoughts)
    plain["content"] = content if content is not None or calls else ""
    return {**plain, "tool_calls": calls} if calls else plain


def _text(content: Any, place: str, thoughts: list[str]) -> str | None:
    """The text of a message: that of its parts a line each, so that no two words become one; `thoughts` is added to."""
    if content is None or isinstance(content, str):
        return content
    texts: list[str] = []
    for at, part in enumerate(content):
        kind, text = _part(part, f"{place}, part {at}")
        (thoughts if kind in _THOUGHT_PARTS else texts).append(text)
    return "\n".join(filter(None, texts))


def _part(part: Any, place: str) -> tuple[str, str]:
    """Type and text.

    Raises:
        RequestError: it has none.
    """
    if isinstance(part, str):
        return "text", part
    kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
    known = {**_TEXT_PARTS, **_THOUGHT_PARTS}
    if not isinstance(kind, str) or kind not in known:
        what = f"of type {kind!r}" if isinstance(kind, str) else f"no part with a type: {echo(part)}"
        raise RequestError(f"{place} is {what[:120]}: this model reads text only", "messages")
    text = part.get(known[kind], "")
    if not isinstance(text, (str, type(None))):
        raise RequestError(f"{place}: {known[kind]} is no text, got {echo(text)}", "messages")
    return kind, text or ""


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"the tool_calls of {place} are no list of objects, got {echo(calls)}", "messages")
    plain = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"a tool call of {place} names no function, got {echo(call)}", "messages")
        arguments = read_arguments(function.get("arguments"))
        kept = {name: value for name, value in call.items() if value is not None}
        plain.append({**kept, "function": {**function, "arguments": arguments}})
    return plain


def read_arguments(arguments: Any) -> Any:
    """The arguments of a call as an object; clients send the text of one.

    What is no object stays as it is: the model itself wrote it, and a conversation has to get over that.
    """
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    if not isinstance(value, dict):
        return arguments
    refuse_unreadable(value, "messages")
    return value
