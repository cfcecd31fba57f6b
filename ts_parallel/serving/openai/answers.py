"""How a request is answered: in which shape, in pieces or at once. Knows texts and counts, no engine, no transport."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ts_parallel.errors import RequestError
from ts_parallel.serving.chat.reader import AnswerReader, Called, Delta, Said
from ts_parallel.serving.exchange import EVENTS, JSON, TEXT, error_body, one_line

_DONE = "data: [DONE]\n\n"  # the end of every stream of OpenAI's, also of one that failed
_NEVER = -9999.0  # the log-probability of what cannot be


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


@dataclass(frozen=True)
class Likelihood:
    """A token and how likely it was."""

    text: str
    raw: bytes | None
    """None where the token shows nowhere but here."""
    logprob: float | None
    """None for a prompt's first token, which nothing comes before."""


@dataclass(frozen=True)
class ScoredToken:
    """A token of an answer, or of a prompt that is part of it, and the most likely ones in its place."""

    own: Likelihood
    best: tuple[Likelihood, ...]
    offset: int
    """Where its text begins in the choice's text."""


class Answer(ABC):
    """One request's answer of one or more choices, each of which ends with a finish reason."""

    content_type: str
    is_stream: bool
    """Whether it was asked for in pieces."""

    @abstractmethod
    def advance(
        self,
        text: str,
        usage: Usage,
        finish_reason: str | None,
        choice: int = 0,
        tokens: Sequence[ScoredToken] | None = None,
    ) -> str | None:
        """What to send for a new piece of one choice; None where nothing is.

        Args:
            usage: of all choices, up to now.
            tokens: those whose text is in the piece; None where log-probabilities are not wanted.
        """

    def fail(self, error: RequestError) -> str:
        """What to send where a stream that has begun cannot go on."""
        return error_body(error)


class TextStream(Answer):
    """The text itself, as it comes."""

    content_type = TEXT
    is_stream = True

    def advance(
        self,
        text: str,
        usage: Usage,
        finish_reason: str | None,
        choice: int = 0,
        tokens: Sequence[ScoredToken] | None = None,
    ) -> str | None:
        return text if text or finish_reason else None


@dataclass
class _Choice:
    """A choice as far as it is known."""

    text: str = ""
    tokens: list[ScoredToken] | None = None
    finish_reason: str | None = None


class WholeText(Answer):
    """One JSON object: `text`, `finish_reason`, `usage`, and `logprobs` where they are wanted."""

    content_type = JSON
    is_stream = False

    def __init__(self, num_choices: int = 1) -> None:
        self._choices = [_Choice() for _ in range(num_choices)]

    def advance(
        self,
        text: str,
        usage: Usage,
        finish_reason: str | None,
        choice: int = 0,
        tokens: Sequence[ScoredToken] | None = None,
    ) -> str | None:
        own = self._choices[choice]
        own.text += text
        if tokens is not None:
            own.tokens = [*(own.tokens or ()), *tokens]
        own.finish_reason = finish_reason
        return self._body(usage) if all(choice.finish_reason for choice in self._choices) else None

    def _body(self, usage: Usage) -> str:
        (own,) = self._choices
        body = {"text": own.text, "finish_reason": own.finish_reason, "usage": usage.as_dict()}
        if own.tokens is not None:
            body["logprobs"] = completion_logprobs(own.tokens)
        return json.dumps(body)


class Completion(WholeText):
    """One OpenAI completion object."""

    def __init__(self, request_id: str, model: str, num_choices: int = 1) -> None:
        super().__init__(num_choices)
        self._head = completion_head(request_id, model)

    def _body(self, usage: Usage) -> str:
        choices = [
            _completion_choice(index, own.text, own.finish_reason, own.tokens)
            for index, own in enumerate(self._choices)
        ]
        return json.dumps({**self._head, "choices": choices, "usage": usage.as_dict()})


class CompletionStream(Answer):
    """OpenAI completion chunks as server-sent events, closed by `[DONE]`."""

    content_type = EVENTS
    is_stream = True

    def __init__(
        self, request_id: str, model: str, num_choices: int = 1, *, include_usage: bool, has_usage_in_each: bool
    ) -> None:
        self._head = self._make_head(request_id, model)
        self._num_open = num_choices
        self._include_usage = include_usage
        self._has_usage_in_each = has_usage_in_each

    def advance(
        self,
        text: str,
        usage: Usage,
        finish_reason: str | None,
        choice: int = 0,
        tokens: Sequence[ScoredToken] | None = None,
    ) -> str | None:
        events = ""
        for own in self._pieces(choice, text, finish_reason, tokens):
            chunk = {**self._head, "choices": [own]}
            if self._include_usage:
                chunk["usage"] = usage.as_dict() if self._has_usage_in_each else None
            events += _event(chunk)
        if not events:
            return None
        self._num_open -= finish_reason is not None
        if self._num_open:
            return events
        if self._include_usage:
            events += _event({**self._head, "choices": [], "usage": usage.as_dict()})
        return events + _DONE

    def fail(self, error: RequestError) -> str:
        return f"data: {error_body(error)}\n\n{_DONE}"

    def _make_head(self, request_id: str, model: str) -> dict[str, Any]:
        return completion_head(request_id, model)

    def _pieces(
        self, index: int, text: str, finish_reason: str | None, tokens: Sequence[ScoredToken] | None
    ) -> list[dict[str, Any]]:
        """What is new of a choice, a chunk for each."""
        if not text and not finish_reason and not tokens:
            return []
        return [self._choice(index, text, finish_reason, tokens)]

    def _choice(
        self, index: int, text: str, finish_reason: str | None, tokens: Sequence[ScoredToken] | None
    ) -> dict[str, Any]:
        return _completion_choice(index, text, finish_reason, tokens)


def _read(reader: AnswerReader, text: str, finish_reason: str | None) -> tuple[list[Delta], str | None]:
    """What more of an answer's text says, and why it ended as a client is told: also because tools are to be called."""
    deltas = reader.add(text)
    if finish_reason is None:
        return deltas, None
    deltas += reader.end(is_cut=finish_reason == "length")
    return deltas, "tool_calls" if finish_reason == "stop" and reader.has_called else finish_reason


@dataclass
class _Message:
    """A chat answer that was read, as far as it is known."""

    texts: dict[str, str] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        if isinstance(delta, Said):
            self.texts[delta.kind] = self.texts.get(delta.kind, "") + delta.text
        elif isinstance(delta, Called):
            self.calls.append(
                {"id": delta.call_id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
            )
        else:
            self.calls[delta.index]["function"]["arguments"] += delta.text

    def as_dict(self) -> dict[str, Any]:
        content = self.texts.get("content", None if self.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if "reasoning_content" in self.texts:
            message["reasoning_content"] = self.texts["reasoning_content"]
        return {**message, "tool_calls": self.calls} if self.calls else message


def _delta(delta: Delta) -> dict[str, Any]:
    if isinstance(delta, Said):
        return {delta.kind: delta.text}
    if isinstance(delta, Called):
        function = {"name": delta.name, "arguments": ""}
        return {"tool_calls": [{"index": delta.index, "id": delta.call_id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}


class ChatCompletion(WholeText):
    """One OpenAI chat completion object."""

    def __init__(
        self, request_id: str, model: str, num_choices: int = 1, readers: Sequence[AnswerReader] | None = None
    ) -> None:
        """
        Args:
            readers: one for each choice, where there is more to its text than content.
        """
        super().__init__(num_choices)
        self._head = chat_head(request_id, model, "chat.completion")
        self._readers = readers
        self._messages = [_Message() for _ in readers or ()]

    def advance(
        self,
        text: str,
        usage: Usage,
        finish_reason: str | None,
        choice: int = 0,
        tokens: Sequence[ScoredToken] | None = None,
    ) -> str | None:
        if self._readers is not None:
            deltas, finish_reason = _read(self._readers[choice], text, finish_reason)
            for delta in deltas:
                self._messages[choice].add(delta)
        return super().advance(text, usage, finish_reason, choice, tokens)

    def _body(self, usage: Usage) -> str:
        read = [message.as_dict() for message in self._messages]
        choices = [
            {
                "index": index,
                "message": read[index] if read else {"role": "assistant", "content": own.text},
                "logprobs": chat_logprobs(own.tokens),
                "finish_reason": own.finish_reason,
            }
            for index, own in enumerate(self._choices)
        ]
        return json.dumps({**self._head, "choices": choices, "usage": usage.as_dict()})


class ChatCompletionStream(CompletionStream):
    """OpenAI chat completion chunks as server-sent events; the first of each choice says who speaks."""

    def __init__(
        self,
        request_id: str,
        model: str,
        num_choices: int = 1,
        readers: Sequence[AnswerReader] | None = None,
        *,
        include_usage: bool,
        has_usage_in_each: bool,
    ) -> None:
        """
        Args:
            readers: as for a whole answer.
        """
        super().__init__(
            request_id, model, num_choices, include_usage=include_usage, has_usage_in_each=has_usage_in_each
        )
        self._silent = set(range(num_choices))
        self._readers = readers

    def _make_head(self, request_id: str, model: str) -> dict[str, Any]:
        return chat_head(request_id, model, "chat.completion.chunk")

    def _pieces(
        self, index: int, text: str, finish_reason: str | None, tokens: Sequence[ScoredToken] | None
    ) -> list[dict[str, Any]]:
        if self._readers is None:
            return super()._pieces(index, text, finish_reason, tokens)
        deltas, finish_reason = _read(self._readers[index], text, finish_reason)
        bodies = [_delta(delta) for delta in deltas]
        if not bodies and (finish_reason or tokens):
            bodies = [{}]
        last = len(bodies) - 1
        none: list[ScoredToken] | None = None if tokens is None else []
        return [
            self._part(index, own, finish_reason if at == last else None, none if at else tokens)
            for at, own in enumerate(bodies)
        ]

    def _choice(
        self, index: int, text: str, finish_reason: str | None, tokens: Sequence[ScoredToken] | None
    ) -> dict[str, Any]:
        return self._part(index, {"content": text}, finish_reason, tokens)

    def _part(
        self, index: int, delta: dict[str, Any], finish_reason: str | None, tokens: Sequence[ScoredToken] | None
    ) -> dict[str, Any]:
        if index in self._silent:
            delta = {"role": "assistant", **({} if "content" in delta else {"content": None}), **delta}
            self._silent.discard(index)
        return {"index": index, "delta": delta, "logprobs": chat_logprobs(tokens), "finish_reason": finish_reason}


def completion_logprobs(tokens: Sequence[ScoredToken] | None) -> dict[str, Any] | None:
    """OpenAI's for completions; the token itself is among the most likely ones, be it one of them or not."""
    if tokens is None:
        return None
    best = [{other.text: _finite(other.logprob) for other in (*token.best, token.own)} for token in tokens]
    return {
        "tokens": [token.own.text for token in tokens],
        "token_logprobs": [_finite(token.own.logprob) for token in tokens],
        "top_logprobs": [None if token.own.logprob is None else own for token, own in zip(tokens, best, strict=True)],
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[ScoredToken] | None) -> dict[str, Any] | None:
    """OpenAI's for chat completions."""

    def entry(token: Likelihood) -> dict[str, Any]:
        raw = None if token.raw is None else list(token.raw)
        return {"token": token.text, "logprob": _finite(token.logprob), "bytes": raw}

    if tokens is None:
        return None
    content = [{**entry(token.own), "top_logprobs": [entry(other) for other in token.best]} for token in tokens]
    return {"content": content, "refusal": None}


def _finite(logprob: float | None) -> float | None:
    """JSON knows no infinity; OpenAI's clients take this for one."""
    return None if logprob is None else max(logprob, _NEVER)


def chat_head(request_id: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{request_id}", "object": kind, "created": int(time.time()), "model": model}


def completion_head(request_id: str, model: str) -> dict[str, Any]:
    return {"id": f"cmpl-{request_id}", "object": "text_completion", "created": int(time.time()), "model": model}


def _completion_choice(
    index: int, text: str, finish_reason: str | None, tokens: Sequence[ScoredToken] | None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": completion_logprobs(tokens), "finish_reason": finish_reason}


def _event(body: dict[str, Any]) -> str:
    return f"data: {one_line(body)}\n\n"
