"""Calls written with a tag for each argument: `<function=NAME><parameter=KEY>VALUE</parameter></function>` or so.

Values are plain text; what type they are, the function's schema says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ts_parallel.serving.chat.calls.base import Arguments, Begin, CallReader, Part, Schemas, overlap

_SPACE = " \t\r\n"
_LONGEST_TAG = 512


@dataclass(frozen=True)
class Tags:
    """How a family writes it; `name` and `key` are expressions with one group."""

    name: str
    key: str
    value_end: str
    end: str = ""
    """Behind the last argument; empty where the region ends there."""
    trim: str = ""
    """What stands between a value and its tags and is none of it."""


class TaggedCalls(CallReader):
    """Reads calls tag by tag. A text passes on letter by letter, any other value once it is whole."""

    def __init__(self, tags: Tags, schemas: Schemas) -> None:
        super().__init__()
        self._tags, self._schemas = tags, schemas
        self._name_tag, self._key_tag = re.compile(tags.name), re.compile(tags.key)
        self._start = ""  # the text of a call that was not told of yet, before the buffer
        self._buffer = ""
        self._read: Callable[[list[Part]], bool] = self._between
        self._name = ""
        self._is_told = False
        self._num_values = 0
        self._types: tuple[str, ...] = ()
        self._is_streamed = False  # of the value being read, a part has passed on

    @property
    def is_inside(self) -> bool:
        return self._read == self._in_value and not self.is_broken

    def add(self, text: str) -> list[Part]:
        self._buffer += text
        parts: list[Part] = []
        while not self.is_broken and self._read(parts):
            pass
        self.unread = "" if self._is_told and not self.is_broken else self._start + self._buffer
        return parts

    def end(self, is_cut: bool) -> list[Part]:
        parts: list[Part] = []
        if not self.is_broken and self._read == self._in_value and is_cut:
            if self._is_streamed and self._buffer:
                parts.append(Arguments(json.dumps(self._buffer, ensure_ascii=False)[1:-1]))
        elif not self.is_broken and not is_cut:
            self._end_call(parts)
        is_between = not self.is_broken and self._read == self._between
        rest = self._start + self._buffer
        self.unread = rest.strip() if is_between and self.has_begun else rest
        if self._is_told and not self.is_broken:
            self.unread = ""
        return parts

    def _end_call(self, parts: list[Part]) -> None:
        """The region has ended, and with it a call whose own end is not written."""
        if self._read == self._in_value:
            if self._tags.end:
                self._buffer = self._buffer.partition(self._tags.end)[0]
            self._buffer += self._tags.value_end
            self._read(parts)
        text = self._buffer.strip()
        if self._read == self._between and not self._tags.end:
            found = self._name_tag.match(f"{text}\n")  # the name alone, which nothing follows
            if found and found[1] == text and text in self._schemas:
                self._name, self._start, self._buffer = text, "", ""
                self._num_values = 0
                self._tell(parts)
                self._finish(parts)
        elif self._read == self._in_call and not text and (self._num_values or self._name in self._schemas):
            self._tell(parts)
            self._buffer = ""
            self._finish(parts)

    def _break(self) -> bool:
        self.is_broken = True
        return False

    def _between(self, parts: list[Part]) -> bool:
        rest = self._buffer.lstrip(_SPACE)
        found = self._name_tag.match(rest)
        if found is None:
            return self._break() if len(rest) > _LONGEST_TAG else False
        self._name = found[1]
        cut = len(self._buffer) - len(rest) + found.end()
        self._start, self._buffer = self._buffer[:cut], self._buffer[cut:]
        self._num_values = 0
        self._read = self._in_call
        return True

    def _in_call(self, parts: list[Part]) -> bool:
        rest = self._buffer.lstrip(_SPACE)
        if not rest:
            return False
        if self._tags.end and rest.startswith(self._tags.end):
            self._tell(parts)
            self._buffer = rest[len(self._tags.end) :]
            self._finish(parts)
            return True
        if found := self._key_tag.match(rest):
            self._tell(parts)
            self._begin_value(found[1], parts)
            self._buffer = rest[found.end() :]
            return True
        is_tag = rest.startswith("<") and len(rest) <= _LONGEST_TAG
        return False if is_tag else self._break()

    def _begin_value(self, key: str, parts: list[Part]) -> None:
        schema = self._schemas.get(self._name, {}).get("properties")
        self._types = types_of(schema.get(key) if isinstance(schema, Mapping) else None)
        parts.append(Arguments(f"{', ' if self._num_values else '{'}{json.dumps(key, ensure_ascii=False)}: "))
        self._num_values += 1
        self._is_streamed = False
        self._read = self._in_value

    def _in_value(self, parts: list[Part]) -> bool:
        if not self._is_streamed and len(self._buffer) < len(self._tags.trim):
            return False
        at = self._buffer.find(self._tags.value_end)
        if self._types == ("string",):
            self._stream(at, parts)
        elif at >= 0:
            value = value_of(self._trimmed(self._buffer[:at]), self._types)
            parts.append(Arguments(json.dumps(value, ensure_ascii=False)))
        if at < 0:
            return False
        self._buffer = self._buffer[self._buffer.index(self._tags.value_end) + len(self._tags.value_end) :]
        self._read = self._in_call
        return True

    def _stream(self, at: int, parts: list[Part]) -> None:
        """Pass on what of a text is certain, all of it where its end stands at `at`."""
        quote = "" if self._is_streamed else '"'
        if not self._is_streamed:
            start = len(self._tags.trim) if self._tags.trim and self._buffer.startswith(self._tags.trim) else 0
            self._buffer = self._buffer[start:]
            at -= start if at >= 0 else 0
        ending = self._tags.trim + self._tags.value_end
        if at >= 0:
            text = self._buffer[:at].removesuffix(self._tags.trim) if self._tags.trim else self._buffer[:at]
            self._buffer = self._buffer[at:]
        else:
            held = max(overlap(self._buffer, ending), overlap(self._buffer, self._tags.value_end))
            text = self._buffer[: len(self._buffer) - held]
            self._buffer = self._buffer[len(text) :]
        self._is_streamed = True
        closing = '"' if at >= 0 else ""
        if piece := quote + json.dumps(text, ensure_ascii=False)[1:-1] + closing:
            parts.append(Arguments(piece))

    def _trimmed(self, text: str) -> str:
        return text.removeprefix(self._tags.trim).removesuffix(self._tags.trim) if self._tags.trim else text

    def _tell(self, parts: list[Part]) -> None:
        if not self._is_told:
            parts.append(Begin(self._name))
            self.has_begun = self._is_told = True
            self._start = ""

    def _finish(self, parts: list[Part]) -> None:
        parts.append(Arguments("}" if self._num_values else "{}"))
        self._is_told = False
        self._read = self._between


def types_of(schema: Any) -> tuple[str, ...]:
    """The types that a JSON schema names; a text where it names none."""
    if not isinstance(schema, Mapping):
        return ("string",)
    named = schema.get("type")
    types = [named] if isinstance(named, str) else list(named) if isinstance(named, list) else []
    for part in ("anyOf", "oneOf", "allOf"):
        for own in schema.get(part) or []:
            types += types_of(own)
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if not types:
        types = ["string" if isinstance(own, str) else "number" for own in values]
    return tuple(dict.fromkeys(types)) or (("any",) if "$ref" in schema or not schema else ("string",))


def value_of(text: str, types: tuple[str, ...]) -> Any:
    """The value that a text stands for, where it may be of these types; the text itself where it is none of them."""
    try:
        value = json.loads(text.strip(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        words = {"true": True, "false": False, "none": None}  # as Python writes them
        value = words.get(text.strip().lower(), text)
    if isinstance(value, str):
        return value if types == ("any",) else text
    if not any(_is_of(value, own) for own in types):
        return text
    is_whole = isinstance(value, float) and "number" not in types and "any" not in types
    return int(value) if is_whole else value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _is_of(value: Any, kind: str) -> bool:
    if kind == "any":
        return not isinstance(value, float) or math.isfinite(value)
    if kind == "null":
        return value is None
    if kind == "boolean":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value.is_integer())
    if isinstance(value, float) and not math.isfinite(value):
        return False
    names: dict[str, Any] = {"number": (int, float), "object": dict, "array": list, "string": str}
    return isinstance(value, names.get(kind, ()))
