"""A chat completion's deltas as Anthropic's message: its blocks, and the events that tell of them in their order."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ts_parallel.errors import RequestError
from ts_parallel.gateway.dialects.chat import CallPiece, Delta, Usage
from ts_parallel.gateway.refusals import anthropic_error_of

Event = dict[str, Any]

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


class StopText:
    """Takes the stop sequence off an answer's end, which the model's server has left there to tell which it was."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """What may be shown now: all but an end that a stop sequence may begin with."""
        text = self._held + text
        size = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - size :]
        return text[: len(text) - size]

    def end(self, is_stopped: bool) -> str:
        """The rest, without the stop sequence where the answer ended by one."""
        held, self._held = self._held, ""
        if is_stopped:
            self.found = max((stop for stop in self._stops if held.endswith(stop)), key=len, default=None)
        return held.removesuffix(self.found) if self.found else held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The length of the longest end of `text` that `stop` begins with, be it all of it."""
        for size in range(min(len(text), len(stop)), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0


class MessageWriter:
    """Owns one message as far as it is made. Each method gives the events that tell of what it did."""

    def __init__(self, model: str, stops: Sequence[str]) -> None:
        self._stop_text = StopText(stops)
        self._block: _Block | None = None
        self._call_index: int | None = None
        self._usage = Usage()
        self._is_begun = False
        self.message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(self._usage),
        }

    def add(self, delta: Delta) -> Iterator[Event]:
        self._usage = delta.usage or self._usage
        if not self._is_begun:
            self._is_begun = True
            self.message["usage"] = _usage(self._usage)
            yield {"type": "message_start", "message": dict(self.message)}
            yield {"type": "ping"}
        if delta.reasoning:
            yield from self._add(_Thinking, delta.reasoning)
        text = self._stop_text.add(delta.text)
        if delta.calls or delta.finish_reason is not None:
            text += self._stop_text.end(delta.finish_reason == "stop")
        if text:
            yield from self._add(_Text, text)
        for piece in delta.calls:
            yield from self._add_call(piece)
        if delta.finish_reason is not None:
            yield from self._close()
            self.message["stop_reason"] = _REASONS.get(delta.finish_reason, "end_turn")
            if self._stop_text.found is not None:
                self.message |= {"stop_reason": "stop_sequence", "stop_sequence": self._stop_text.found}

    def end(self) -> Iterator[Event]:
        """The last events."""
        self.message["usage"] = _usage(self._usage)
        ended = {key: self.message[key] for key in ("stop_reason", "stop_sequence")}
        yield {"type": "message_delta", "delta": ended, "usage": self.message["usage"]}
        yield {"type": "message_stop"}

    def fail(self, error: RequestError) -> Iterator[Event]:
        """The last event where the answer cannot go on."""
        yield anthropic_error_of(error)

    def _add(self, kind: type[_Block], text: str) -> Iterator[Event]:
        if not isinstance(self._block, kind):
            yield from self._close()
            yield from self._open(kind())
        yield self._delta(text)

    def _add_call(self, piece: CallPiece) -> Iterator[Event]:
        if not isinstance(self._block, _ToolUse) or piece.index != self._call_index:
            yield from self._close()
            self._call_index = piece.index
            yield from self._open(_ToolUse(piece.id or f"toolu_{uuid.uuid4().hex}", piece.name or ""))
        if piece.arguments:
            yield self._delta(piece.arguments)

    def _open(self, block: _Block) -> Iterator[Event]:
        self._block = block
        yield {"type": "content_block_start", "index": self._place, "content_block": dict(block.body)}

    def _delta(self, text: str) -> Event:
        assert self._block is not None
        return {"type": "content_block_delta", "index": self._place, "delta": self._block.add(text)}

    def _close(self) -> Iterator[Event]:
        if self._block is not None:
            yield {"type": "content_block_stop", "index": self._place}
            self.message["content"].append(self._block.whole())
            self._block = None

    @property
    def _place(self) -> int:
        return len(self.message["content"])


class _Block:
    """One block of the content."""

    def __init__(self) -> None:
        self._text = ""
        self.body: dict[str, Any] = {}
        """As it begins."""

    def add(self, text: str) -> dict[str, Any]:
        """What tells of more of it."""
        self._text += text
        return {}

    def whole(self) -> dict[str, Any]:
        """As it ends."""
        return self.body


class _Text(_Block):
    def __init__(self) -> None:
        super().__init__()
        self.body = {"type": "text", "text": ""}

    def add(self, text: str) -> dict[str, Any]:
        super().add(text)
        return {"type": "text_delta", "text": text}

    def whole(self) -> dict[str, Any]:
        return {**self.body, "text": self._text}


class _Thinking(_Block):
    def __init__(self) -> None:
        super().__init__()
        self.body = {"type": "thinking", "thinking": "", "signature": ""}

    def add(self, text: str) -> dict[str, Any]:
        super().add(text)
        return {"type": "thinking_delta", "thinking": text}

    def whole(self) -> dict[str, Any]:
        return {**self.body, "thinking": self._text}


class _ToolUse(_Block):
    def __init__(self, call_id: str, name: str) -> None:
        super().__init__()
        self.body = {"type": "tool_use", "id": call_id, "name": name, "input": {}}

    def add(self, text: str) -> dict[str, Any]:
        super().add(text)
        return {"type": "input_json_delta", "partial_json": text}

    def whole(self) -> dict[str, Any]:
        """Arguments that are no object, as where the answer was cut off, are told as they came."""
        try:
            found = json.loads(self._text or "{}")
        except ValueError:
            found = None
        return {**self.body, "input": found if isinstance(found, dict) else {"_unparsed": self._text}}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts a prompt's tokens that were cached by themselves."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_completion_tokens,
    }
