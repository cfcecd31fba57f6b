"""A chat answer's text → content, reasoning and tool calls, in pieces. What cannot be read as a call is content."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from ts_parallel.serving.chat.calls.base import Begin, CallReader, Part, Schemas, overlap
from ts_parallel.serving.chat.formats import CALLS, REASONING, ChatFormat
from ts_parallel.serving.chat.regions import Closed, Event, Opened, Regions, Text

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Said:
    """More of a text."""

    kind: Literal["content", "reasoning_content"]
    text: str


@dataclass(frozen=True)
class Called:
    """A call begins: the answer's `index`th."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of its arguments."""

    index: int
    text: str


Delta = Said | Called | CallArguments


class AnswerReader:
    """Reads one answer. Owns what its text has told so far, and whitespace of which nobody knows yet whether it counts.

    Whitespace between regions belongs to none of them; inside a text, and where there are no regions, it stays.
    """

    def __init__(
        self, chat_format: ChatFormat, template: ResponseTemplate, opening: str, tools: list[dict[str, Any]]
    ) -> None:
        """
        Args:
            opening: what of the prompt belongs to the answer.
            tools: those that may be called, as a request has them.
        """
        self._format = chat_format
        self._tools = tools
        self._schemas: Schemas = {own["function"]["name"]: own["function"].get("parameters") or {} for own in tools}
        self._regions = Regions(template, opening)
        self._region: Literal["content", "reasoning_content"] = "content"
        if self._regions.begins_in in REASONING:
            self._region = "reasoning_content"
        self._is_fresh = self._region != "content"  # behind a marker, where whitespace counts for nothing
        self._held = ""
        self._has_said = False  # any content
        self._calls: CallReader | None = None
        self._marker = ""  # the one that has opened the region of calls
        self._before = ("", False)  # what was held then, and whether it was fresh
        self._is_text = False  # the region is none of calls after all, so its last marker is text like all of it
        self._late = ""  # the marker that is to close a region whose arguments have held one like it
        self._rest = ""  # what may be the beginning of that
        self._num_calls = 0

    @property
    def has_called(self) -> bool:
        return self._num_calls > 0

    def add(self, text: str) -> list[Delta]:
        return self._read(self._regions.add(text))

    def end(self, is_cut: bool) -> list[Delta]:
        """What is left at the end.

        Args:
            is_cut: whether the answer ended because it became too long.
        """
        deltas = self._read(self._regions.end())
        if self._calls is not None:
            self._end_calls("", is_cut, deltas)
        if self._held and not self._is_fresh:
            deltas.append(Said(self._region, self._held))
        self._held = ""
        return _merged(deltas)

    def _read(self, events: list[Event]) -> list[Delta]:
        deltas: list[Delta] = []
        for event in events:
            if isinstance(event, Text):
                self._read_text(event.text, deltas)
            elif self._calls is not None and event.marker and self._calls.is_inside:
                self._read_text(event.marker, deltas)
                if event.field == CALLS:  # of which the regions see the end, if they have seen it begin
                    self._late = event.marker if isinstance(event, Closed) else ""
            elif isinstance(event, Opened):
                self._open(event, deltas)
            else:
                self._close(event, deltas)
        return _merged(deltas)

    def _read_text(self, text: str, deltas: list[Delta]) -> None:
        text, self._rest = self._rest + text, ""
        while self._calls is not None and self._late:
            before, marker, text = text.partition(self._late)
            if not marker:
                num_held = overlap(before, self._late)
                self._rest = before[len(before) - num_held :]
                self._read_calls(before[: len(before) - num_held], deltas)
                return
            self._read_calls(before, deltas)
            if self._calls is not None and self._calls.is_inside:
                self._read_calls(marker, deltas)
            elif self._calls is not None:
                self._close(Closed(CALLS, marker), deltas)
            else:
                self._say(marker, deltas)
        if self._calls is None:
            self._say(text, deltas)
        else:
            self._read_calls(text, deltas)

    def _read_calls(self, text: str, deltas: list[Delta]) -> None:
        calls = self._calls
        assert calls is not None
        self._take(calls.add(text), deltas)
        if calls.is_broken:
            self._give_up(calls.unread, deltas)

    def _open(self, event: Opened, deltas: list[Delta]) -> None:
        if self._calls is not None:
            self._end_calls("", False, deltas)
        self._before = (self._held, self._is_fresh)
        self._after_region()
        if event.field == CALLS:
            self._calls = self._format.call_reader(event.captures, self._schemas, self._tools)
            self._marker = event.marker
        elif event.field in REASONING:
            self._region = "reasoning_content"
        elif self._has_said:  # one text after another, each with markers of its own
            self._held, self._is_fresh = "\n", False

    def _close(self, event: Closed, deltas: list[Delta]) -> None:
        if self._is_text:
            self._is_text = False
            self._say(event.marker, deltas)
        elif self._calls is None or self._end_calls(event.marker, False, deltas):
            self._after_region()

    def _after_region(self) -> None:
        self._held, self._is_fresh, self._region = "", True, "content"
        self._late, self._is_text = "", False

    def _end_calls(self, marker: str, is_cut: bool, deltas: list[Delta]) -> bool:
        """The region of calls is over, by a marker or with the answer. Whether it was one."""
        calls = self._calls
        assert calls is not None
        rest, self._rest, self._late = self._rest, "", ""
        self._take([*calls.add(rest), *calls.end(is_cut)], deltas)
        if calls.unread or not calls.has_begun:
            self._give_up(calls.unread, deltas)
        self._calls = None
        is_text, self._is_text = self._is_text, False
        if is_text:
            self._say(marker, deltas)
        return not is_text

    def _give_up(self, text: str, deltas: list[Delta]) -> None:
        """The text is no call; neither is the marker before it, where no call has come since."""
        assert self._calls is not None
        if not self._calls.has_begun:
            self._held, self._is_fresh = self._before
            self._is_text = True
            text = self._marker + text
        self._calls = None
        self._say(text, deltas)

    def _take(self, parts: list[Part], deltas: list[Delta]) -> None:
        for part in parts:
            if isinstance(part, Begin):
                deltas.append(Called(self._num_calls, _new_id(self._format.id_length), part.name))
                self._num_calls += 1
            else:
                deltas.append(CallArguments(self._num_calls - 1, part.text))

    def _say(self, text: str, deltas: list[Delta]) -> None:
        """Whitespace waits for what comes behind it."""
        text = self._held + text
        if self._is_fresh:
            text = text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :]
        if kept:
            self._is_fresh = False
            self._has_said = self._has_said or self._region == "content"
            deltas.append(Said(self._region, kept))


def _new_id(length: int | None) -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(length)) if length else f"call_{secrets.token_hex(12)}"


def _merged(deltas: list[Delta]) -> list[Delta]:
    """What follows on each other and is of one kind, as one."""
    merged: list[Delta] = []
    for own in deltas:
        last = merged[-1] if merged else None
        if isinstance(own, Said) and isinstance(last, Said) and own.kind == last.kind:
            merged[-1] = Said(own.kind, last.text + own.text)
        elif isinstance(own, CallArguments) and isinstance(last, CallArguments) and own.index == last.index:
            merged[-1] = CallArguments(own.index, last.text + own.text)
        else:
            merged.append(own)
    return merged
