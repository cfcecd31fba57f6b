"""Bodies of OpenAI's `v1/responses` as fields of a chat completion: items become messages, tools their other shape."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ts_parallel.errors import RequestError
from ts_parallel.gateway.dialects.chat import texts_of

logger = logging.getLogger(__name__)

# Fields that say what is to be kept, counted or shown, and nothing of the answer's text.
_NEUTRAL = frozenset(
    "client_metadata include max_tool_calls metadata model previous_response_id prompt_cache_key "
    "prompt_cache_retention safety_identifier service_tier store stream stream_options truncation user".split()
)
_REFUSED = ("background", "conversation", "prompt", "context_management")
# Fields that a chat completion has under the same name are passed as they are, and so is what is not known here: the
# model's server refuses or ignores it. These have another name there.
_RENAMED = {"max_output_tokens": "max_completion_tokens"}
# Tools that OpenAI's own servers run. A model that is not told of them answers without.
_HOSTED = (
    "code_interpreter computer_use_preview file_search image_generation local_shell mcp shell web_search "
    "web_search_preview"
).split()
_CUSTOM_PARAMETERS = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
_said: set[str] = set()  # of which the log has told once


@dataclass(frozen=True)
class Turn:
    """A body as it is asked for."""

    fields: dict[str, Any]
    """Of a chat completion, without messages."""
    messages: list[dict[str, Any]]
    """Without the instructions, which are of one turn only."""
    instructions: str | None
    custom_tools: frozenset[str] = field(default_factory=frozenset)
    """Names of those that take a text in place of arguments."""

    def chat_fields(self, before: list[dict[str, Any]]) -> dict[str, Any]:
        """With the messages of the turns before."""
        head = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return {**self.fields, "messages": [*head, *before, *self.messages]}


def parse_turn(body: Mapping[str, Any]) -> Turn:
    """
    Raises:
        RequestError: a field cannot be honoured.
    """
    for name in _REFUSED:
        if body.get(name):
            raise RequestError(f"{name!r} is not supported: send all that matters in 'input'", name)
    fields: dict[str, Any] = {"stream": bool(body.get("stream"))}
    read = ("input", "instructions", "tools", "tool_choice", "text", "reasoning", "top_logprobs", *_NEUTRAL)
    for name, value in body.items():
        if name not in read and name not in _REFUSED and value is not None:
            fields[_RENAMED.get(name, name)] = value
    instructions = body.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise RequestError("'instructions' must be a text", "instructions")
    fields |= _format_fields(body.get("text")) | _reasoning_fields(body.get("reasoning"))
    if "message.output_text.logprobs" in (body.get("include") or ()) or body.get("top_logprobs"):
        fields |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0}
    tools, custom = _tools(body.get("tools"))
    if tools:
        fields |= {"tools": tools, **_tool_choice(body.get("tool_choice"), tools)}
    else:
        fields.pop("parallel_tool_calls", None)
    return Turn(fields, messages_of(body.get("input")), instructions, custom)


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


def _tools(tools: Any) -> tuple[list[dict[str, Any]], frozenset[str]]:
    """Chat's shape of them, and the names of those that take a text."""
    made, custom = [], set()
    for number, tool in enumerate(_list(tools, "tools")):
        kind = tool.get("type")
        if kind == "function":
            function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key)}
            made.append({"type": "function", "function": {"parameters": {"type": "object"}, **function}})
        elif kind == "custom":
            custom.add(str(tool.get("name")))
            own = {"name": tool.get("name"), "description": tool.get("description") or ""}
            made.append({"type": "function", "function": {**own, "parameters": _CUSTOM_PARAMETERS}})
        elif str(kind).startswith(tuple(_HOSTED)):
            _say_once(f"tools of type {kind!r} are left out: they run on OpenAI's servers alone")
        else:
            raise RequestError(f"tools.{number}: a tool is of type function or custom, got {kind!r}", "tools")
    return made, frozenset(custom)


def _tool_choice(choice: Any, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Chat's shape of the choice; where only some tools are allowed, those alone are offered."""
    if choice is None or isinstance(choice, str):
        return {} if choice is None else {"tool_choice": choice}
    kind, name = choice.get("type"), choice.get("name")
    if kind in ("function", "custom"):
        return {"tool_choice": {"type": "function", "function": {"name": name}}}
    if kind == "allowed_tools":
        names = {tool.get("name") for tool in _list(choice.get("tools"), "tool_choice")}
        allowed = [tool for tool in tools if tool["function"].get("name") in names]
        return {"tools": allowed, "tool_choice": choice.get("mode", "auto")}
    raise RequestError(f"tool_choice of type {kind!r} cannot be made here: name a function", "tool_choice")


def messages_of(items: Any) -> list[dict[str, Any]]:
    """An input, a text or a list of items, as chat's messages. What an assistant thought, said and called in one turn
    is one message.

    Raises:
        RequestError: an item is none that can be read.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(_list(items, "input")):
        kind = item.get("type", "message")
        if kind not in _READERS:
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
    arguments = item.get("arguments")
    if item.get("type") == "custom_tool_call":
        arguments = json.dumps({"input": item.get("input", "")})
    if not isinstance(item.get("name"), str) or not isinstance(arguments, str):
        raise RequestError(f"{place}: a call has a name and its arguments as a text", "input")
    call = {"id": item.get("call_id"), "type": "function", "function": {"name": item["name"], "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


def _output(item: dict[str, Any], place: str) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": item.get("call_id"),
        "content": texts_of(item.get("output"), f"{place}.output"),
    }


def _reasoning(item: dict[str, Any], place: str) -> dict[str, Any]:
    return {"role": "assistant", "reasoning_content": texts_of(item.get("content"), f"{place}.content")}


_READERS: Mapping[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "message": _message,
    "function_call": _call,
    "custom_tool_call": _call,
    "function_call_output": _output,
    "custom_tool_call_output": _output,
    "reasoning": _reasoning,
}


def _list(value: Any, name: str) -> list[dict[str, Any]]:
    if value is None and name != "input":
        return []
    if not isinstance(value, list) or not all(isinstance(own, dict) for own in value):
        raise RequestError(f"{name!r} must be a list of objects" + (" or a text" if name == "input" else ""), name)
    return value


def _say_once(text: str) -> None:
    if text not in _said and len(_said) < 100:
        _said.add(text)
        logger.warning(text)
