"""Bodies of OpenAI's `v1/responses` as fields of a chat completion: items become messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ts_parallel.errors import RequestError
from ts_parallel.gateway.described.fields import (
    COUNT,
    LIST,
    OBJECT,
    TEXT,
    TEXT_OR_LIST,
    TEXT_OR_OBJECT,
    TRUTH,
    Fields,
    of_any_type,
)
from ts_parallel.gateway.dialects.chat import texts_of
from ts_parallel.gateway.dialects.responses_tools import SEARCH, Tools, chat_name, objects, parse_tools

# Fields that say what is to be kept, counted or shown, and nothing of the answer's text.
_NEUTRAL = of_any_type(
    "client_metadata max_tool_calls metadata prompt_cache_key prompt_cache_retention safety_identifier service_tier "
    "stream_options truncation user"
) | {"include": LIST, "model": TEXT, "previous_response_id": TEXT, "store": TRUTH, "stream": TRUTH}
_READ = {
    "input": TEXT_OR_LIST,
    "instructions": TEXT,
    "tools": LIST,
    "tool_choice": TEXT_OR_OBJECT,
    "text": OBJECT,
    "reasoning": OBJECT,
    "top_logprobs": COUNT,
}
FIELDS: Fields = {**_NEUTRAL, **_READ}
_REFUSED = ("background", "conversation", "prompt", "context_management")
# Fields that a chat completion has under the same name are passed as they are, and so is what is not known here: the
# model's server refuses or ignores it. These have another name there.
_RENAMED = {"max_output_tokens": "max_completion_tokens"}


@dataclass(frozen=True)
class Turn:
    """A body as it is asked for."""

    fields: dict[str, Any]
    """Of a chat completion, without messages."""
    messages: list[dict[str, Any]]
    """Without the instructions, which are of one turn only."""
    instructions: str | None
    tools: Tools = field(default_factory=Tools)
    found: list[dict[str, Any]] = field(default_factory=list)
    """Tools that searches have brought, in this turn and before."""

    def chat_fields(self, before: list[dict[str, Any]]) -> dict[str, Any]:
        """With the messages of the turns before."""
        head = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return {**self.fields, "messages": [*head, *before, *self.messages]}


def parse_turn(body: Mapping[str, Any], found: Sequence[dict[str, Any]] = ()) -> Turn:
    """
    Args:
        found: tools that searches of the turns before have brought.

    Raises:
        RequestError: a field cannot be honoured.
    """
    for name in _REFUSED:
        if body.get(name):
            raise RequestError(f"{name!r} is not supported: send all that matters in 'input'", name)
    fields: dict[str, Any] = {"stream": bool(body.get("stream"))}
    for name, value in body.items():
        if name not in FIELDS and name not in _REFUSED and value is not None:
            fields[_RENAMED.get(name, name)] = value
    instructions = body.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise RequestError("'instructions' must be a text", "instructions")
    fields |= _format_fields(body.get("text")) | _reasoning_fields(body.get("reasoning"))
    if "message.output_text.logprobs" in (body.get("include") or ()) or body.get("top_logprobs"):
        fields |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0}
    own_found = [*found, *_found_in(body.get("input"))]
    tools = parse_tools(body.get("tools"), own_found)
    if tools.functions:
        fields |= {"tools": tools.functions, **tools.choice(body.get("tool_choice"))}
    else:
        fields.pop("parallel_tool_calls", None)
    return Turn(fields, messages_of(body.get("input")), instructions, tools, own_found)


def _format_fields(text: Any) -> dict[str, Any]:
    if text is None:
        return {}
    if not isinstance(text, dict):
        raise RequestError("'text' must be an object", "text")
    fields = {"verbosity": text["verbosity"]} if text.get("verbosity") else {}
    form = text.get("format") or {"type": "text"}
    kind = form.get("type") if isinstance(form, dict) else form
    if kind == "text":
        return fields
    if kind == "json_object":
        return {**fields, "response_format": {"type": "json_object"}}
    if kind == "json_schema":
        schema = {key: value for key, value in form.items() if key != "type"}
        return {**fields, "response_format": {"type": "json_schema", "json_schema": schema}}
    raise RequestError(f"text.format.type must be text, json_object or json_schema, got {kind!r}", "text")


def _reasoning_fields(reasoning: Any) -> dict[str, Any]:
    effort = reasoning.get("effort") if isinstance(reasoning, dict) else None
    return {} if effort is None else {"reasoning_effort": effort}


def _found_in(items: Any) -> list[dict[str, Any]]:
    """The tools that a client's searches have brought."""
    outputs = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    outputs = [item for item in outputs if item.get("type") == f"{SEARCH}_output"]
    return [tool for item in outputs for tool in objects(item.get("tools"), "input")]


def messages_of(items: Any) -> list[dict[str, Any]]:
    """An input, a text or a list of items, as chat's messages. What an assistant thought, said and called in one turn
    is one message.

    Raises:
        RequestError: an item is none that can be read.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(objects(items, "input")):
        kind = item.get("type", "message")
        if not isinstance(kind, str) or kind not in _READERS:
            raise RequestError(f"input.{number}: an item of type {kind!r} cannot be read", "input")
        _append(messages, _READERS[kind](item, f"input.{number}"))
    return [{"content": None, **message} if message["role"] == "assistant" else message for message in messages]


def _append(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    last = messages[-1] if messages else {}
    is_of_last = last.get("role") == message["role"] == "assistant" and (
        "tool_calls" in message or not last.keys() & {"content", "tool_calls"}
    )
    if not is_of_last:
        messages.append(message)
        return
    calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
    thought = "\n".join(own["reasoning_content"] for own in (last, message) if own.get("reasoning_content"))
    last |= message | ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": thought} if thought else {})


def _message(item: dict[str, Any], place: str) -> dict[str, Any]:
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        raise RequestError(f"{place}: a message's role is user, assistant, system or developer, got {role!r}", "input")
    if isinstance(content, list):
        content = [_part(part, f"{place}.content.{number}") for number, part in enumerate(content)]
        if all(part["type"] == "text" for part in content) and len(content) == 1:
            content = content[0]["text"]
    elif not isinstance(content, str):
        raise RequestError(f"{place}: a message's content is a text or a list of parts", "input")
    return {"role": role, "content": content}


def _part(part: Any, place: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text", "text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind == "input_image" and isinstance(part.get("image_url"), str):  # the model says whether it sees
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    raise RequestError(f"{place}: a part is of type input_text, output_text or refusal, got {kind!r}", "input")


def _call(item: dict[str, Any], place: str) -> dict[str, Any]:
    kind, name, arguments = item["type"], item.get("name"), item.get("arguments")
    if kind == "custom_tool_call":
        arguments = json.dumps({"input": item.get("input", "")})
    elif kind == f"{SEARCH}_call":
        name, arguments = SEARCH, json.dumps(arguments)
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise RequestError(f"{place}: a call has a name and its arguments as a text", "input")
    function = {"name": chat_name(name, item.get("namespace")), "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "type": "function", "function": function}]}


def _output(item: dict[str, Any], place: str) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": item.get("call_id"),
        "content": texts_of(item.get("output"), f"{place}.output"),
    }


def _search_output(item: dict[str, Any], place: str) -> dict[str, Any]:
    """What a search has brought, in words: the tools themselves are offered from then on."""
    found = parse_tools(None, objects(item.get("tools"), "input")).functions
    told = [{key: own["function"].get(key) for key in ("name", "description")} for own in found]
    return {"role": "tool", "tool_call_id": item.get("call_id"), "content": json.dumps(told)}


def _reasoning(item: dict[str, Any], place: str) -> dict[str, Any]:
    return {"role": "assistant", "reasoning_content": texts_of(item.get("content"), f"{place}.content")}


_READERS: Mapping[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "message": _message,
    "function_call": _call,
    "custom_tool_call": _call,
    f"{SEARCH}_call": _call,
    "function_call_output": _output,
    "custom_tool_call_output": _output,
    f"{SEARCH}_output": _search_output,
    "reasoning": _reasoning,
}
