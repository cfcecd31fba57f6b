"""A chat completion's deltas as OpenAI's response: its items, and the events that tell of them in their order."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ts_parallel.errors import RequestError
from ts_parallel.gateway.dialects.chat import CallPiece, Delta, Usage
from ts_parallel.gateway.dialects.responses_input import Turn
from ts_parallel.gateway.dialects.responses_tools import SEARCH, Tool

Event = dict[str, Any]

# Of a body, what its response repeats, and what it says where the body does not.
_REPEATED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseWriter:
    """Owns one response as far as it is made. Each method gives the events that tell of what it did."""

    def __init__(self, body: Mapping[str, Any], model: str, turn: Turn) -> None:
        repeated = {name: default if body.get(name) is None else body[name] for name, default in _REPEATED.items()}
        self._tools = turn.tools
        self._number = 0
        self._item: _Item | None = None
        self._call_index: int | None = None
        self._usage = Usage()
        self.response: dict[str, Any] = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
            **repeated,
        }

    def begin(self) -> Iterator[Event]:
        yield self._event("response.created", response=dict(self.response))
        yield self._event("response.in_progress", response=dict(self.response))

    def add(self, delta: Delta) -> Iterator[Event]:
        self._usage = delta.usage or self._usage
        if delta.reasoning:
            yield from self._add_text(_Reasoning, delta.reasoning, ())
        if delta.text or delta.logprobs:
            yield from self._add_text(_Message, delta.text, delta.logprobs)
        for piece in delta.calls:
            yield from self._add_call(piece)
        if delta.finish_reason is not None:
            yield from self._close()
            self._finish(delta.finish_reason)

    def end(self) -> Iterator[Event]:
        """The last event. An answer without any item has an empty message."""
        if not self.response["output"]:
            yield from self._open(_Message())
            yield from self._close()
        self.response["usage"] = _usage(self._usage)
        name = "response.incomplete" if self.response["status"] == "incomplete" else "response.completed"
        yield self._event(name, response=self.response)

    def fail(self, error: RequestError) -> Iterator[Event]:
        """The last event where the answer cannot go on."""
        code = getattr(error, "code", None)
        self.response["status"] = "failed"
        self.response["error"] = {"code": code if isinstance(code, str) else "server_error", "message": str(error)}
        yield self._event("response.failed", response=self.response)

    def _finish(self, reason: str) -> None:
        self.response["status"] = "completed"
        if reason in ("length", "content_filter"):
            self.response["status"] = "incomplete"
            why = "max_output_tokens" if reason == "length" else reason
            self.response["incomplete_details"] = {"reason": why}
            if self.response["output"]:
                self.response["output"][-1]["status"] = "incomplete"

    def _add_text(self, kind: type[_Text], text: str, logprobs: tuple[dict[str, Any], ...]) -> Iterator[Event]:
        if not isinstance(self._item, kind):
            yield from self._close()
            yield from self._open(kind())
        assert isinstance(self._item, _Text)
        yield from self._tell(self._item.add(text, logprobs))

    def _add_call(self, piece: CallPiece) -> Iterator[Event]:
        if not isinstance(self._item, _Call) or piece.index != self._call_index:
            yield from self._close()
            self._call_index = piece.index
            tool = self._tools.called(piece.name or "")
            yield from self._open(_CALLS[tool.kind](piece.id or new_id("call"), tool))
        assert isinstance(self._item, _Call)
        if piece.arguments:
            yield from self._tell(self._item.add(piece.arguments))

    def _open(self, item: _Item) -> Iterator[Event]:
        self._item = item
        self.response["output"].append(item.body)
        added = json.loads(json.dumps(item.body))
        yield self._event("response.output_item.added", output_index=self._place, item=added)
        yield from self._tell(item.begin())

    def _close(self) -> Iterator[Event]:
        if self._item is None:
            return
        yield from self._tell(self._item.end())
        self._item.body["status"] = "completed"
        yield self._event("response.output_item.done", output_index=self._place, item=self._item.body)
        self._item = None

    @property
    def _place(self) -> int:
        return len(self.response["output"]) - 1

    def _tell(self, events: Iterator[Event]) -> Iterator[Event]:
        assert self._item is not None
        for event in events:
            name = event.pop("type")
            yield self._event(name, item_id=self._item.body["id"], output_index=self._place, **event)

    def _event(self, name: str, /, **fields: Any) -> Event:
        event = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return event


class _Item:
    """One item of the output."""

    body: dict[str, Any]

    def begin(self) -> Iterator[Event]:
        yield from ()

    def end(self) -> Iterator[Event]:
        yield from ()


class _Text(_Item):
    """One with a single part of text."""

    name: str
    part: dict[str, Any]
    extra: bool

    def begin(self) -> Iterator[Event]:
        yield {"type": "response.content_part.added", "content_index": 0, "part": dict(self.part)}
        self.body["content"].append(self.part)

    def add(self, text: str, logprobs: tuple[dict[str, Any], ...]) -> Iterator[Event]:
        self.part["text"] += text
        more = {}
        if self.extra:
            self.part["logprobs"].extend(logprobs)
            more = {"logprobs": list(logprobs)}
        yield {"type": f"response.{self.name}.delta", "content_index": 0, "delta": text, **more}

    def end(self) -> Iterator[Event]:
        more = {"logprobs": self.part["logprobs"]} if self.extra else {}
        yield {"type": f"response.{self.name}.done", "content_index": 0, "text": self.part["text"], **more}
        yield {"type": "response.content_part.done", "content_index": 0, "part": self.part}


class _Message(_Text):
    name, extra = "output_text", True

    def __init__(self) -> None:
        self.part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.body = {
            "id": new_id("msg"),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }


class _Reasoning(_Text):
    name, extra = "reasoning_text", False

    def __init__(self) -> None:
        self.part = {"type": "reasoning_text", "text": ""}
        self.body = {"id": new_id("rs"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}


class _Call(_Item):
    """A call of a function."""

    def __init__(self, call_id: str, tool: Tool) -> None:
        self.body = _body_of_call("fc", "function_call", call_id, tool) | {"arguments": ""}

    def add(self, arguments: str) -> Iterator[Event]:
        self.body["arguments"] += arguments
        yield {"type": "response.function_call_arguments.delta", "delta": arguments}

    def end(self) -> Iterator[Event]:
        arguments, name = self.body["arguments"], self.body["name"]
        yield {"type": "response.function_call_arguments.done", "name": name, "arguments": arguments}


class _CustomCall(_Call):
    """A call of a tool that takes a text, which the model writes as a function's one argument: known at its end."""

    def __init__(self, call_id: str, tool: Tool) -> None:
        self._arguments = ""
        self.body = _body_of_call("ctc", "custom_tool_call", call_id, tool) | {"input": ""}

    def add(self, arguments: str) -> Iterator[Event]:
        self._arguments += arguments
        yield from ()

    def end(self) -> Iterator[Event]:
        try:
            found = json.loads(self._arguments)["input"]
        except (ValueError, LookupError, TypeError):
            found = self._arguments
        self.body["input"] = found if isinstance(found, str) else self._arguments
        yield {"type": "response.custom_tool_call_input.delta", "delta": self.body["input"]}
        yield {"type": "response.custom_tool_call_input.done", "input": self.body["input"]}


class _SearchCall(_Call):
    """A search for tools, which the client runs: its arguments are an object, known at its end."""

    def __init__(self, call_id: str, tool: Tool) -> None:
        self._arguments = ""
        own = {"id": new_id("tsc"), "type": f"{SEARCH}_call", "status": "in_progress", "call_id": call_id}
        self.body = {**own, "execution": "client", "arguments": {}}

    def add(self, arguments: str) -> Iterator[Event]:
        self._arguments += arguments
        yield from ()

    def end(self) -> Iterator[Event]:
        try:
            self.body["arguments"] = json.loads(self._arguments)
        except ValueError:  # it was cut off
            self.body["arguments"] = {"query": self._arguments}
        yield from ()


_CALLS: Mapping[str, type[_Call]] = {"function": _Call, "custom": _CustomCall, SEARCH: _SearchCall}


def _body_of_call(prefix: str, kind: str, call_id: str, tool: Tool) -> dict[str, Any]:
    body = {"id": new_id(prefix), "type": kind, "status": "in_progress", "call_id": call_id, "name": tool.name}
    return body if tool.namespace is None else {**body, "namespace": tool.namespace}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
    }
