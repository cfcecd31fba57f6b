"""How a request is answered: in which shape, in pieces or at once. Knows texts and counts, no engine, no transport."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ts_parallel.errors import RequestError

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
EVENTS = "text/event-stream"


@dataclass(frozen=True)
class Usage:
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0
    """Of the prompt's, those that an earlier request had computed."""

    def as_dict(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
        }
        if self.num_cached_tokens:
            usage["prompt_tokens_details"] = {"cached_tokens": self.num_cached_tokens}
        return usage


def error_body(error: RequestError) -> str:
    """An error in OpenAI's shape, which the native route shares."""
    body = {"message": str(error), "type": error.kind, "param": error.parameter, "code": error.status}
    return json.dumps({"error": body})


class Answer(ABC):
    """One request's answer. `advance` is called with each new piece of text, the last time with a finish reason."""

    content_type: str

    @abstractmethod
    def advance(self, text: str, usage: Usage, finish_reason: str | None) -> str | None:
        """What to send now; None where nothing is. `usage` counts up to now."""

    def fail(self, error: RequestError) -> str:
        """What to send where a stream that has begun cannot go on."""
        return error_body(error)


class TextStream(Answer):
    """The text itself, as it comes."""

    content_type = TEXT

    def advance(self, text: str, usage: Usage, finish_reason: str | None) -> str | None:
        return text if text or finish_reason else None


class WholeText(Answer):
    """One JSON object: `text`, `finish_reason`, `usage`."""

    content_type = JSON

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def advance(self, text: str, usage: Usage, finish_reason: str | None) -> str | None:
        self._pieces.append(text)
        return self._body("".join(self._pieces), usage, finish_reason) if finish_reason else None

    def _body(self, text: str, usage: Usage, finish_reason: str) -> str:
        return json.dumps({"text": text, "finish_reason": finish_reason, "usage": usage.as_dict()})


class Completion(WholeText):
    """One OpenAI completion object."""

    def __init__(self, request_id: str, model: str) -> None:
        super().__init__()
        self._head = completion_head(request_id, model)

    def _body(self, text: str, usage: Usage, finish_reason: str) -> str:
        return json.dumps({**self._head, "choices": [_choice(text, finish_reason)], "usage": usage.as_dict()})


class CompletionStream(Answer):
    """OpenAI completion chunks as server-sent events, closed by `[DONE]`."""

    content_type = EVENTS

    def __init__(self, request_id: str, model: str, *, include_usage: bool, has_usage_in_each: bool) -> None:
        self._head = self._make_head(request_id, model)
        self._include_usage = include_usage
        self._has_usage_in_each = has_usage_in_each

    def advance(self, text: str, usage: Usage, finish_reason: str | None) -> str | None:
        if not text and not finish_reason:
            return None
        chunk = {**self._head, "choices": [self._choice(text, finish_reason)]}
        if self._include_usage:
            chunk["usage"] = usage.as_dict() if self._has_usage_in_each else None
        events = _event(chunk)
        if finish_reason and self._include_usage:
            events += _event({**self._head, "choices": [], "usage": usage.as_dict()})
        return events + "data: [DONE]\n\n" if finish_reason else events

    def fail(self, error: RequestError) -> str:
        return f"data: {error_body(error)}\n\n"

    def _make_head(self, request_id: str, model: str) -> dict[str, Any]:
        return completion_head(request_id, model)

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return _choice(text, finish_reason)


class ChatCompletion(WholeText):
    """One OpenAI chat completion object."""

    def __init__(self, request_id: str, model: str) -> None:
        super().__init__()
        self._head = chat_head(request_id, model, "chat.completion")

    def _body(self, text: str, usage: Usage, finish_reason: str) -> str:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return json.dumps({**self._head, "choices": [choice], "usage": usage.as_dict()})


class ChatCompletionStream(CompletionStream):
    """OpenAI chat completion chunks as server-sent events; the first says who speaks."""

    _has_spoken = False

    def _make_head(self, request_id: str, model: str) -> dict[str, Any]:
        return chat_head(request_id, model, "chat.completion.chunk")

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if self._has_spoken else {"role": "assistant", "content": text}
        self._has_spoken = True
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def chat_head(request_id: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{request_id}", "object": kind, "created": int(time.time()), "model": model}


def completion_head(request_id: str, model: str) -> dict[str, Any]:
    return {"id": f"cmpl-{request_id}", "object": "text_completion", "created": int(time.time()), "model": model}


def model_list(model: str, created: int, max_model_len: int) -> str:
    """OpenAI's `GET v1/models`."""
    entry = {"id": model, "object": "model", "created": created, "owned_by": "ts_parallel"}
    return json.dumps({"object": "list", "data": [{**entry, "max_model_len": max_model_len}]})


def _choice(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
