"""Bodies of Anthropic's `v1/messages` as fields of a chat completion: blocks become messages, tools change shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
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

# Fields that say what is to be kept, counted or shown, and nothing of the answer's text.
_NEUTRAL = of_any_type("betas cache_control container inference_geo metadata service_tier") | {"model": TEXT}
_READ = {
    "max_tokens": COUNT,
    "messages": LIST,
    "output_config": OBJECT,
    "output_format": OBJECT,
    "stop_sequences": LIST,
    "stream": TRUTH,
    "system": TEXT_OR_LIST,
    "thinking": OBJECT,
    "tool_choice": TEXT_OR_OBJECT,
    "tools": LIST,
}
FIELDS: Fields = {**_NEUTRAL, **_READ}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """
    Raises:
        RequestError: a field is missing, or cannot be honoured.
    """
    most = body.get("max_tokens")
    if isinstance(most, bool) or not isinstance(most, (int, float)):
        raise RequestError("max_tokens: field required, a whole number", "max_tokens")
    fields: dict[str, Any] = {"max_tokens": most, "stream": bool(body.get("stream"))}
    # What a chat completion has under the same name, and what is not known here, is for the model's server to judge.
    fields |= {key: own for key, own in body.items() if key not in FIELDS and own is not None}
    if stop_sequences(body):
        fields |= {"stop": stop_sequences(body), "include_stop_str_in_output": True}
    fields |= prompt_fields(body) | _form_fields(body)
    thinking = body.get("thinking")
    if isinstance(thinking, dict) and thinking.get("type") == "disabled":
        fields["chat_template_kwargs"] = {"enable_thinking": False}
    choice = body.get("tool_choice")
    if choice is not None and fields.get("tools"):
        fields |= _choice_fields(choice)
    return fields


def prompt_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """What makes up the prompt: `messages`, and `tools` where there are any.

    Raises:
        RequestError: as `chat_fields`.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: a list of at least one message is required", "messages")
    made: list[dict[str, Any]] = []
    system = texts_of(body.get("system"), "system")
    if system:
        made.append({"role": "system", "content": system})
    for number, message in enumerate(messages):
        made += _messages(message, f"messages.{number}")
    tools = [_tool(tool, f"tools.{number}") for number, tool in enumerate(body.get("tools") or ())]
    return {"messages": made, **({"tools": tools} if tools else {})}


def stop_sequences(body: Mapping[str, Any]) -> list[str]:
    """
    Raises:
        RequestError: they are no texts.
    """
    stops = body.get("stop_sequences") or []
    if not isinstance(stops, list) or not all(isinstance(own, str) and own for own in stops):
        raise RequestError("stop_sequences: a list of texts, none empty", "stop_sequences")
    return stops


def _form_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    config = body.get("output_config") or {}
    form = body.get("output_format") or config.get("format")
    fields = {"reasoning_effort": config["effort"]} if config.get("effort") else {}
    if form is None:
        return fields
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        raise RequestError("output_config.format: only type json_schema is known", "output_config")
    schema = {"name": "answer", "schema": form.get("schema")}
    return {**fields, "response_format": {"type": "json_schema", "json_schema": schema}}


def _choice_fields(choice: Any) -> dict[str, Any]:
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind == "tool":
        made: Any = {"type": "function", "function": {"name": choice.get("name")}}
    elif isinstance(kind, str) and kind in _CHOICES:
        made = _CHOICES[kind]
    else:
        raise RequestError(f"tool_choice: type is auto, any, tool or none, got {kind!r}", "tool_choice")
    fields = {"tool_choice": made}
    if choice.get("disable_parallel_tool_use") is not None:
        fields["parallel_tool_calls"] = not choice["disable_parallel_tool_use"]
    return fields


def _tool(tool: Any, place: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") not in (None, "custom") or "input_schema" not in tool:
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise RequestError(f"{place}: only tools with an input_schema can be offered, got {kind!r}", "tools")
    function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
    if tool.get("description"):
        function["description"] = tool["description"]
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _messages(message: Any, place: str) -> list[dict[str, Any]]:
    """One message as one or several: results of tools are messages of their own, before what else a user says."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("user", "assistant", "system"):
        raise RequestError(f"{place}: a message's role is user or assistant, got {role!r}", "messages")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise RequestError(f"{place}: a message's content is a text or a list of blocks", "messages")
    read = _assistant if role == "assistant" else _user
    return read(role, [(block, f"{place}.content.{number}") for number, block in enumerate(content)])


def _user(role: str, blocks: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
    results, parts = [], []
    for block, place in blocks:
        if block.get("type") == "tool_result":
            text = texts_of(block.get("content"), f"{place}.content")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        else:
            parts.append(_part(block, place))
    if not parts and results:
        return results
    is_text = len(parts) == 1 and parts[0]["type"] == "text"
    return [*results, {"role": role, "content": parts[0]["text"] if is_text else parts}]


def _part(block: dict[str, Any], place: str) -> dict[str, Any]:
    kind, source = block.get("type"), block.get("source")
    if kind == "text" and isinstance(block.get("text"), str):
        return {"type": "text", "text": block["text"]}
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text":
        return {"type": "text", "text": str(source.get("data"))}
    if kind == "image" and isinstance(source, dict):  # the model says whether it sees
        url = source.get("url") or f"data:{source.get('media_type')};base64,{source.get('data')}"
        return {"type": "image_url", "image_url": {"url": url}}
    raise RequestError(f"{place}: a block of type {kind!r} cannot be read", "messages")


def _assistant(role: str, blocks: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
    texts, thoughts, calls = [], [], []
    for block, place in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(str(block.get("text") or ""))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            raise RequestError(f"{place}: a block of type {kind!r} cannot be read", "messages")
    message: dict[str, Any] = {"role": role, "content": "".join(texts) if texts else None}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return [{**message, "tool_calls": calls} if calls else message]
