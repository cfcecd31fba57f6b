"""JSON of megabytes, read and written in parts: between two of them other threads go on.

Python's own `json` keeps every other thread waiting until it is done: 6 MB of numbers take it
0.25 s, of small objects 0.5.
What is read here is what `json.loads` reads, and what is written what `json.dumps` writes.
"""

from __future__ import annotations

import gc
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

LONG = 1 << 16
"""From so many bytes on it is worth it."""

_PART = 1 << 15  # letters that are read at once, which takes some milliseconds at most
_MOST_LEVELS = 200  # of objects and lists in one another that are too long to be read at once
_ITEMS_OF_A_PART = 4096
_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_WHITE_SPACE: Any = re.compile(r"[ \t\n\r]*")  # which is everywhere, be it empty
# Where elements may have ended, most likely first.
_CUTS = (",", "},", "],")


class _NotAtOnce(Exception):
    """An element does not come to its end within what is read at once."""


def loads(text: bytes | bytearray | str) -> Any:
    """As `json.loads`.

    Raises:
        ValueError, RecursionError: it is no JSON, or lies too deep.
    """
    if not isinstance(text, str):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    if len(text) < LONG:
        return json.loads(text)
    if text.startswith("\ufeff"):
        raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
    with _without_the_collector():
        value, end = _value(text, _skip(text, 0), 0)
    end = _skip(text, end)
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return value


def dumps(value: Any) -> str:
    """As `json.dumps`. What may be long is a list, or one right in an object."""
    if not isinstance(value, dict):
        return _list(value)
    return "{" + ", ".join(f"{json.dumps(str(name))}: {_list(own)}" for name, own in value.items()) + "}"


def _list(value: Any) -> str:
    if not isinstance(value, list) or len(value) <= _ITEMS_OF_A_PART:
        return json.dumps(value)
    parts = range(0, len(value), _ITEMS_OF_A_PART)
    return f"[{', '.join(_dumped(value[at : at + _ITEMS_OF_A_PART]) for at in parts)}]"


def _dumped(items: list[Any]) -> str:
    text = json.dumps(items)[1:-1]
    give_way()
    return text


def give_way() -> None:
    """Let another thread have the interpreter, where one wants it."""
    time.sleep(0)


def _value(text: str, at: int, level: int) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends. One that is long is read in parts."""
    begin = text[at : at + 1]
    if begin not in ("[", "{"):
        return _scanned(text, at)  # of a text all at once, which is quick
    try:
        return _at_once(text, at)
    except _NotAtOnce:
        pass
    if level == _MOST_LEVELS:
        raise RecursionError(f"more than {_MOST_LEVELS} levels of objects and lists")
    return _long_list(text, at + 1, level) if begin == "[" else _long_object(text, at + 1, level)


def _skip(text: str, at: int) -> int:
    """Where white space ends."""
    end: int = _WHITE_SPACE.match(text, at).end()
    return end


def _scanned(text: str, at: int) -> tuple[Any, int]:
    try:
        return _scan(text, at)
    except StopIteration as error:
        raise json.JSONDecodeError("Expecting value", text, error.value) from None


def _at_once(text: str, at: int) -> tuple[Any, int]:
    """A list or an object within a part. What is cut off never looks whole: it ends by a bracket of its own."""
    part = text[at : at + _PART]
    try:
        value, length = _scan(part, 0)
    except (StopIteration, ValueError):
        raise _NotAtOnce from None
    return value, at + length


def _long_list(text: str, at: int, level: int) -> tuple[list[Any], int]:
    """From behind its bracket on."""
    items: list[Any] = []
    while True:
        at = _skip(text, at)
        if not items and text.startswith("]", at):
            return items, at + 1
        some, at, is_last = _some(text, at, [])
        items += some
        if is_last:
            return items, at
        if some:
            continue
        item, at = _value(text, at, level + 1)
        items.append(item)
        at = _skip(text, at)
        if text.startswith("]", at):
            return items, at + 1
        at = _behind(",", text, at)


def _long_object(text: str, at: int, level: int) -> tuple[dict[str, Any], int]:
    """From behind its bracket on."""
    items: dict[str, Any] = {}
    while True:
        at = _skip(text, at)
        if not items and text.startswith("}", at):
            return items, at + 1
        some, at, is_last = _some(text, at, {})
        items.update(some)
        if is_last:
            return items, at
        if some:
            continue
        name, at = _name(text, at)
        items[name], at = _value(text, at, level + 1)
        at = _skip(text, at)
        if text.startswith("}", at):
            return items, at + 1
        at = _behind(",", text, at)


L = TypeVar("L", list[Any], dict[str, Any])


def _some(text: str, at: int, none: L) -> tuple[L, int, bool]:
    """The elements that lie whole within a part, where what follows them begins, and whether they were the last."""
    part = text[at : at + _PART]
    give_way()
    opening, closing = ("{", "}") if isinstance(none, dict) else ("[", "]")
    for mark in _CUTS:
        end = part.rfind(mark) + len(mark) - 1
        if end < len(mark):
            continue
        # Had it been cut inside an element, that one's own bracket or quotation mark would be missing.
        try:
            some: L = json.loads(f"{opening}{part[:end]}{closing}")
        except ValueError:
            continue
        if some:
            return some, at + end + 1, False
    some, end, is_last = _one_by_one(part, none, closing)
    return some, at + end, is_last


def _one_by_one(part: str, some: L, closing: str) -> tuple[L, int, bool]:
    """As `_some`: what it is that does not fit, or is no JSON, is for others to find out."""
    at = end = 0
    while True:
        try:
            name, at = _name(part, at) if isinstance(some, dict) else ("", at)
            value, at = _scan(part, at)
        except (StopIteration, ValueError):
            return some, end, False
        at = _skip(part, at)
        if at == len(part) or part[at] not in (",", closing):
            return some, end, False
        if isinstance(some, dict):
            some[name] = value
        else:
            some.append(value)
        end = at + 1
        if part[at] == closing:
            return some, end, True
        at = _skip(part, end)


def _name(text: str, at: int) -> tuple[str, int]:
    """An object's next name, and where its value begins."""
    if not text.startswith('"', at):
        raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
    name, at = _scanned(text, at)
    at = _behind(":", text, _skip(text, at))
    return name, _skip(text, at)


def _behind(mark: str, text: str, at: int) -> int:
    if not text.startswith(mark, at):
        raise json.JSONDecodeError(f"Expecting '{mark}' delimiter", text, at)
    return at + 1


_collector_lock = threading.Lock()
_num_without = 0
_was_enabled = False


@contextmanager
def _without_the_collector() -> Iterator[None]:
    """It goes through all that was made again and again, and no thread meanwhile: 6 MB of small objects took 3.6 s with
    it and 0.3 s without. What was made is put with what it seldom looks at, for it would look at it soon after; where
    a process has frozen what it began with, with that, once what others have left is away."""
    global _num_without, _was_enabled
    with _collector_lock:
        if not _num_without:
            _was_enabled = gc.isenabled()
            gc.disable()
            if gc.get_freeze_count():
                gc.collect()
        _num_without += 1
    try:
        yield
    finally:
        with _collector_lock:
            _num_without -= 1
            if not _num_without and _was_enabled:
                has_frozen = gc.get_freeze_count() > 0
                gc.freeze()
                if not has_frozen:
                    gc.unfreeze()
                gc.enable()
