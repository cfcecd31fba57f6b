"""Calls written as JSON: `{"name": …, "arguments": {…}}`, several in a list or in a row, or a head and then arguments.

The arguments pass on as the model writes them, letter by letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence

from ts_parallel.serving.chat.calls.base import Arguments, Begin, CallReader, Part

_BETWEEN = " \t\r\n,;["  # what may stand before a call
_IN_STRING = re.compile(r'["\\]')
_IN_CONTAINER = re.compile(r'["{}\[\]]')
_AFTER_SCALAR = re.compile(r"[\s,}\]]")
_LONGEST_HEAD = 512
_HARMLESS = ("type", "id", "tool_call_id", "call_id", "index")  # keys beside a call's name and arguments


class ValueEnd:
    """Finds where a JSON value ends that comes in pieces."""

    def __init__(self, first: str) -> None:
        """
        Args:
            first: the letter that the value begins with.
        """
        self.is_in_string = False
        self._is_scalar = first not in '"{['
        self._is_escaped = False
        self._depth = 0

    def find(self, text: str, at: int) -> int | None:
        """Where in `text` the value ends that goes on at `at`; None where it does not."""
        if self._is_scalar:
            found = _AFTER_SCALAR.search(text, at)
            return found.start() if found else None
        while at < len(text):
            if self._is_escaped:
                self._is_escaped, at = False, at + 1
                continue
            found = (_IN_STRING if self.is_in_string else _IN_CONTAINER).search(text, at)
            if found is None:
                return None
            at = found.end()
            self._pass(found[0])
            if not self._depth and not self.is_in_string:
                return at
        return None

    def _pass(self, letter: str) -> None:
        if letter == "\\":
            self._is_escaped = True
        elif letter == '"':
            self.is_in_string = not self.is_in_string
        else:
            self._depth += 1 if letter in "{[" else -1


class JsonCalls(CallReader):
    """Reads objects that name a function and its arguments."""

    def __init__(
        self,
        functions: Collection[str],
        *,
        only_known: bool = False,
        name_keys: Sequence[str] = ("name",),
        arguments_keys: Sequence[str] = ("arguments", "parameters"),
        head: str | None = None,
        tails: Sequence[str] = (),
    ) -> None:
        """
        Args:
            functions: those there are.
            only_known: whether nothing but a name of theirs tells a call from other JSON.
            head: what may stand before bare arguments, an expression with the group `name`.
            tails: what may stand after them.
        """
        super().__init__()
        self._functions, self._only_known = functions, only_known
        self._name_keys, self._arguments_keys = name_keys, arguments_keys
        self._head = re.compile(head) if head else None
        self._tails = tails
        self._buffer = ""  # of which the letters before `_at` are understood
        self._at = 0
        self._forget()

    def _forget(self) -> None:
        """What was read up to here is a call that is over, or nothing yet."""
        self._read: Callable[[list[Part]], bool] = self._between
        self._buffer, self._at = self._buffer[self._at :], 0
        self._name: str | None = None
        self._is_told = False
        self._arguments: str | None = None
        self._key = ""
        self._value: ValueEnd | None = None
        self._seen = 0  # up to where a value was looked through
        self._is_bare = False  # arguments behind a head, in no object of their own
        self._has_others = False

    @property
    def is_inside(self) -> bool:
        return not self.is_broken and self._value is not None and self._value.is_in_string

    def add(self, text: str) -> list[Part]:
        self._buffer += text
        parts: list[Part] = []
        while not self.is_broken and self._read(parts):
            pass
        if self._is_told and self._value is not None:  # of arguments that have passed on nothing is kept
            self._buffer, self._at = self._buffer[self._at :], 0
        self._note_unread()
        return parts

    def end(self, is_cut: bool) -> list[Part]:
        parts: list[Part] = []
        is_head = self._read == self._in_head and not self.has_begun and not is_cut
        if is_head and not self.is_broken and self._head is not None:
            found = self._head.fullmatch(self._buffer.strip())
            if found and found["name"] in self._functions and self._tell(found["name"], parts):
                parts.append(Arguments("{}"))
        self._note_unread()
        return parts

    def _note_unread(self) -> None:
        if self.is_broken or not self._is_told:
            is_between = not self.is_broken and self._read == self._between and self.has_begun
            self.unread = self._buffer.strip(_BETWEEN + "]") if is_between else self._buffer
        else:
            self.unread = ""

    def _letter(self, skipped: str) -> str | None:
        """The next letter that is none of `skipped`."""
        while self._at < len(self._buffer) and self._buffer[self._at] in skipped:
            self._at += 1
        return self._buffer[self._at] if self._at < len(self._buffer) else None

    def _break(self) -> bool:
        self.is_broken = True
        if self._is_told:
            self._buffer, self._at = self._buffer[self._at :], 0
        return False

    # Each of these reads a step further, and says whether it got anywhere.

    def _between(self, parts: list[Part]) -> bool:
        letter = self._letter(_BETWEEN + "]" if self.has_begun else _BETWEEN)
        if letter is None:
            return False
        if letter == "{":
            self._at += 1
            self._read = self._before_key
            return True
        if self._head is not None:
            self._read = self._in_head
            return True
        return self._break()

    def _in_head(self, parts: list[Part]) -> bool:
        assert self._head is not None
        brace = self._buffer.find("{", self._at)
        if brace < 0:
            return self._break() if len(self._buffer) - self._at > _LONGEST_HEAD else False
        found = self._head.fullmatch(self._buffer[self._at : brace].strip())
        if found is None or not self._tell(found["name"], parts):
            return self._break()
        self._at, self._is_bare, self._value = brace, True, ValueEnd("{")
        self._read = self._in_arguments
        return True

    def _before_key(self, parts: list[Part]) -> bool:
        letter = self._letter(" \t\r\n,")
        if letter is None:
            return False
        if letter == "}":
            self._at += 1
            return self._close(parts)
        if letter != '"':
            return self._break()
        self._read = self._in_key
        return True

    def _whole(self) -> str | None:
        """The text of the value at the place, once all of it is here."""
        if self._value is None:
            self._value, self._seen = ValueEnd(self._buffer[self._at]), self._at
        end = self._value.find(self._buffer, self._seen)
        if end is None:
            self._seen = len(self._buffer)
            return None
        text, self._at, self._value = self._buffer[self._at : end], end, None
        return text

    def _in_key(self, parts: list[Part]) -> bool:
        text = self._whole()
        if text is None:
            return False
        key = _loaded(text)
        self._key = key if isinstance(key, str) else ""
        self._read = self._before_colon
        return True

    def _before_colon(self, parts: list[Part]) -> bool:
        letter = self._letter(" \t\r\n")
        if letter is None:
            return False
        if letter != ":":
            return self._break()
        self._at += 1
        self._read = self._before_value
        return True

    def _before_value(self, parts: list[Part]) -> bool:
        letter = self._letter(" \t\r\n")
        if letter is None:
            return False
        if self._key in self._arguments_keys and letter == "{" and self._arguments is None:
            self._arguments, self._value = "", ValueEnd("{")
            self._read = self._in_arguments
            return self._name is None or self._tell(self._name, parts) or self._break()
        self._read = self._in_value
        return True

    def _in_value(self, parts: list[Part]) -> bool:
        text = self._whole()
        if text is None:
            return False
        self._read = self._before_key
        value = _loaded(text)
        if self._key in self._name_keys and self._name is None:
            if not isinstance(value, str) or (self._only_known and value not in self._functions):
                return self._break()
            self._name = value
            return True
        if self._key in self._arguments_keys and self._arguments is None:
            return self._take_arguments(value)
        self._has_others = self._has_others or self._key not in _HARMLESS
        return not (self._only_known and self._has_others) or self._break()

    def _take_arguments(self, value: object) -> bool:
        """Arguments that are no object: none, or one that is written as a text once more."""
        if isinstance(value, str) and value.strip():
            self._arguments = value
            return isinstance(_loaded(value), dict) or self._break()
        self._arguments = "{}"
        return value in (None, "", []) or self._break()

    def _in_arguments(self, parts: list[Part]) -> bool:
        assert self._value is not None
        end = self._value.find(self._buffer, self._at)
        text = self._buffer[self._at : end]
        self._at = len(self._buffer) if end is None else end
        if not self._is_told:
            self._arguments = (self._arguments or "") + text
        elif text:
            parts.append(Arguments(text))
        if end is None:
            return False
        self._value = None
        self._read = self._in_tail if self._is_bare else self._before_key
        return True

    def _in_tail(self, parts: list[Part]) -> bool:
        letter = self._letter(" \t\r\n")
        rest = self._buffer[self._at : self._at + 64]
        if tail := next((own for own in self._tails if rest.startswith(own)), ""):
            self._at += len(tail)
            return True
        if letter is None or any(own.startswith(rest) for own in self._tails):
            return False
        self._forget()
        return True

    def _close(self, parts: list[Part]) -> bool:
        """An object has ended."""
        if not self._is_told:
            if (
                self._name is None
                or (self._arguments is None and self._has_others)
                or not self._tell(self._name, parts)
            ):
                return self._break()
            parts.append(Arguments(self._arguments or "{}"))
        self._forget()
        return True

    def _tell(self, name: str, parts: list[Part]) -> bool:
        """Whether the call may be told of."""
        if not name or (self._only_known and name not in self._functions):
            return False
        parts.append(Begin(name))
        self.has_begun = self._is_told = True
        return True


def _loaded(text: str) -> object:
    """None too where it is no JSON."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
