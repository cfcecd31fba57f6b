"""Tools for chat templates that know none: the functions, the calls and what came of them are told in words.

Such a template would leave them out. What the words ask for is the form that answers are read in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INTRODUCTION = "You can call functions. Each of these lines describes one as JSON:"
_HOW = (
    "To call a function, answer with nothing but this, with the function's name in place of NAME and its arguments, "
    "a JSON object, in place of ARGUMENTS:"
)
_AFTERWARDS = "What it returns is told to you then. If no function helps, answer in your own words."

Message = dict[str, Any]


def in_words(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    written: Mapping[str, Any],
    *,
    has_system: bool,
) -> list[Message]:
    """The same conversation, without tools, calls and messages of tools.

    Args:
        messages: contents are texts or None, arguments objects.
        written: how a family writes calls.
        has_system: whether the template takes messages of the role system.
    """
    names: dict[Any, str] = {}
    told: list[Message] = []
    is_behind_result = False
    for message in messages:
        own = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        if calls := message.get("tool_calls"):
            names |= {call.get("id"): call["function"]["name"] for call in calls}
            own["content"] = "\n".join(filter(None, [own.get("content"), _calls(calls, written)]))
        is_result = message.get("role") == "tool"
        if is_result:
            name = message.get("name") or names.get(message.get("tool_call_id"), "The function")
            own = {"role": "user", "content": f"{name} returned: {own.get('content') or ''}"}
        if is_result and is_behind_result:
            told[-1]["content"] += f"\n{own['content']}"
        else:
            told.append(own)
        is_behind_result = is_result
    return _introduced(told, tools, written, has_system) if tools else told


def _introduced(
    messages: list[Message], tools: Sequence[Mapping[str, Any]], written: Mapping[str, Any], has_system: bool
) -> list[Message]:
    functions = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    form = _form("NAME", "ARGUMENTS", written)
    words = "\n".join([_INTRODUCTION, *functions, "", _HOW, form, _AFTERWARDS])
    role = "system" if has_system else "user"
    first = messages[0]
    if first.get("role") == role:
        return [{**first, "content": f"{words}\n\n{first.get('content') or ''}".rstrip()}, *messages[1:]]
    return [{"role": role, "content": words}, *messages]


def _calls(calls: Sequence[Mapping[str, Any]], written: Mapping[str, Any]) -> str:
    texts = []
    for call in calls:
        arguments = call["function"].get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        texts.append(_form(call["function"]["name"], text, written))
    return "\n".join(texts)


def _form(name: str, arguments: str, written: Mapping[str, Any]) -> str:
    call = f"{written.get('before', '')}{written['call']}{written.get('after', '')}"
    return str(call.replace("$name", name).replace("$arguments", arguments))
