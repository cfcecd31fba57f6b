"""Calls that are read once they are whole, by transformers' own parsers of content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers.utils.chat_parsing import parse_response

from ts_parallel.serving.chat.calls.base import Arguments, Begin, CallReader, Part
from ts_parallel.serving.chat.calls.json_calls import ValueEnd

_BODY = "body"
_NO_ANCHOR = "\x00"  # there is no prompt to look for a turn in


class WholeCalls(CallReader):
    """Collects a region, and reads it where it ends as the `response_template` of its tokenizer says."""

    def __init__(self, field: Mapping[str, Any], captures: Mapping[str, str], tools: list[dict[str, Any]]) -> None:
        """
        Args:
            field: the template's, of tool calls.
            captures: what its opening said.
            tools: as a request has them, for the types of their arguments.
        """
        super().__init__()
        self._field, self._captures, self._tools = field, captures, tools

    @property
    def is_inside(self) -> bool:
        """Where it is JSON, and no call yet."""
        start = self.unread.find("{")
        if start < 0 or self._parts_of_all():
            return False
        value = ValueEnd("{")
        value.find(self.unread, start)
        return value.is_in_string

    def add(self, text: str) -> list[Part]:
        self.unread += text
        return []

    def end(self, is_cut: bool) -> list[Part]:
        parts = self._parts_of_all()
        if parts:
            self.unread, self.has_begun = "", True
        else:
            self.is_broken = True
        return parts

    def _parts_of_all(self) -> list[Part]:
        field = self._field
        if field.get("content") == "json" and field.get("content_args"):  # JSON itself is read as JSON, not as its kin
            return self._parts({**field, "content_args": {}}) or self._parts(field)
        return self._parts(field)

    def _parts(self, field: Mapping[str, Any]) -> list[Part]:
        """None where it is no call, or one of several is none."""
        kept = {key: value for key, value in field.items() if key in ("content", "content_args", "transform_each")}
        transform = _filled(field.get("transform"), self._captures)
        body = {**kept, **({} if transform is None else {"transform": transform})}
        try:
            template = {"start_anchor": _NO_ANCHOR, "fields": {_BODY: body}}
            value = parse_response(self.unread or " ", template, prefix="", tools=self._tools)[_BODY]
            return [part for own in (value if isinstance(value, list) else [value]) for part in _call_parts(own)]
        except (ValueError, KeyError, TypeError, RecursionError):
            return []


def _call_parts(call: Any) -> list[Part]:
    """
    Raises:
        ValueError, KeyError, TypeError: it is no call.
    """
    function = call.get("function", call)
    name, arguments = function["name"], function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        if not isinstance(json.loads(arguments), dict):
            raise ValueError("arguments that are no object")
    elif isinstance(arguments, dict) or arguments is None:
        arguments = json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)
    else:
        raise ValueError("arguments that are no object")
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    return [Begin(name), Arguments(arguments)]


def _filled(transform: Any, captures: Mapping[str, str]) -> Any:
    """The transform with what the opening said in its places."""
    if isinstance(transform, dict):
        return {key: _filled(value, captures) for key, value in transform.items()}
    if isinstance(transform, list):
        return [_filled(value, captures) for value in transform]
    if isinstance(transform, str) and transform.startswith("{") and transform[1:-1] in captures:
        return captures[transform[1:-1]]
    return transform
