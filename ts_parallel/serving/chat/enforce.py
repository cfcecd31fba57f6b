"""Grammars, in llguidance's notation, of answers that call functions in the form that a model's family writes.

A marker that is a special token is written by that token, any other as the text that it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ts_parallel.serving.chat.formats import ChatFormat
from ts_parallel.serving.chat.tools import Function, Offer
from ts_parallel.serving.text.structured_output import WHITESPACE

_TEXT = "/(?s:.*)/"
_PLACES = re.compile(r"\$(name|arguments|key|value|text)")


def calls_grammar(
    chat_format: ChatFormat,
    offer: Offer,
    special: Mapping[str, int],
    *,
    ends: Sequence[int],
    thinks: bool,
    otherwise: Mapping[str, Any] | None = None,
) -> str:
    """A grammar of answers that call what is offered: all of them where it must be, else each call once it begins.

    Args:
        special: the names of tokens that make no text, with their ids.
        ends: the tokens that end an answer.
        thinks: whether the prompt has begun a reasoning.
        otherwise: the JSON schema of an answer that calls nothing.
    """
    written = chat_format.written
    assert written is not None
    return _Grammar(chat_format, written, special, frozenset(ends)).make(offer, thinks, otherwise)


class _Grammar:
    """One grammar on its way. Owns its rules."""

    def __init__(
        self, chat_format: ChatFormat, written: Mapping[str, Any], special: Mapping[str, int], ends: frozenset[int]
    ) -> None:
        self._format, self._written = chat_format, written
        self._special, self._ends = special, ends
        names = sorted(filter(None, special), key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, names))) if names else None
        self._rules: list[str] = []
        self._num_rules = 0

    def make(self, offer: Offer, thinks: bool, otherwise: Mapping[str, Any] | None) -> str:
        calls = self._calls(offer)
        thought = self._thought(thinks)
        if offer.must_call:
            start = f"{thought} {calls}"
        elif otherwise is not None:
            start = f"{thought} ({calls} | {self._schema(otherwise)})"
        elif "plain" in self._written:
            start = f"{thought} ({calls} | /{self._written['plain']}/)"
        elif "plain_text" in self._written:
            start = f"{thought} ({calls} | {self._filled(self._written['plain_text'], {'text': _TEXT})})"
        else:
            start = self._among_text(calls, offer.may_be_many)
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules])

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"r{self._num_rules}"
        self._num_rules += 1
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def _calls(self, offer: Offer) -> str:
        """All calls of an answer."""
        written = self._written
        call = self._rule(" | ".join(self._call(own) for own in offer.functions))
        body = call
        if offer.may_be_many and not written.get("is_one"):
            body = f"{call} ({self._literal(written.get('between', ''))} {call})*"
        parts = [self._literal(written.get("before", "")), body, self._literal(written.get("after", ""))]
        return self._rule(" ".join(parts))

    def _call(self, function: Function) -> str:
        text = self._written["call"]
        if "argument" in self._written:
            arguments = self._tagged(function.schema)
        else:
            arguments = self._schema(function.schema)
        return self._filled(text, {"name": self._literal(function.name), "arguments": arguments})

    def _tagged(self, schema: Mapping[str, Any]) -> str:
        """Arguments with a tag each, those that are not required being left out or not."""
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        parts = []
        for key, own in properties.items():
            argument = self._rule(self._argument(self._literal(key), own, shared))
            parts.append(argument if key in required else f"{argument}?")
        if not properties and schema.get("additionalProperties") is not False:
            parts.append(self._rule(self._argument("/[a-zA-Z0-9_.-]+/", {"type": "string"}, {})) + "*")
        return " ".join(parts)

    def _argument(self, key: str, schema: Any, shared: Mapping[str, Any]) -> str:
        text = self._written["argument"]
        before, after = text.split("$value")
        head = self._filled(before, {"key": key})
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        choices = schema.get("enum") if isinstance(schema, Mapping) else None
        if choices and all(isinstance(own, str) for own in choices):
            return f"{head} ({' | '.join(self._literal(own) for own in choices)}) {self._literal(after)}"
        if kind not in ("string", None) or (isinstance(schema, Mapping) and kind is None and schema):
            return f"{head} {self._schema({**shared, **schema})} {self._literal(after)}"
        pattern = schema.get("pattern") if isinstance(schema, Mapping) else None
        if pattern and "/" not in pattern:
            return f"{head} /{pattern.removeprefix('^').removesuffix('$')}/ {self._literal(after)}"
        return f"{head} {self._text_until(after)}"

    def _thought(self, has_begun: bool) -> str:
        """What a model may think before: the rest of it where the prompt has begun it."""
        if "thought" in self._written:
            return "(" + self._filled(self._written["thought"], {"text": _TEXT}) + ")?"
        if self._format.reasoning_markers is None:
            return ""
        begin, end = self._format.reasoning_markers
        rest = f"{self._text_until(end)} /\\n{{0,2}}/"
        return rest if has_begun else f"({self._literal(begin)} {rest})?"

    def _among_text(self, calls: str, may_be_many: bool) -> str:
        """Any text, in which a call goes on as one once its marker is there."""
        trigger = self._written["trigger"]
        text = self._written.get("before", "") + self._written["call"]
        assert text.startswith(trigger)
        forbidden = self._ends | {self._special[trigger]} if trigger in self._special else self._ends
        free = sorted(set(self._special.values()) - forbidden)
        if trigger in self._special:
            others = f" (<[{','.join(map(str, free))}]> {_TEXT})*" if free else ""
            plain = self._rule(f"{_TEXT}{others}")
            called = f"{plain} {calls}"
        else:
            begun = self._rule(f"{_TEXT} {json.dumps(trigger)}", "[lazy]")
            plain = self._rule(_TEXT)
            called = f"{begun} {self._without_trigger(calls, trigger)}"
        return f"({called})* {plain}" if may_be_many else f"{plain} | {called}"

    def _without_trigger(self, calls: str, trigger: str) -> str:
        """The same calls, of which the lazy text before has had the first marker."""
        quoted = json.dumps(trigger)[:-1]
        at = next(number for number, rule in enumerate(self._rules) if rule.startswith(f"{calls}: "))
        body = self._rules[at].partition(": ")[2]
        if body.lstrip().startswith(quoted):
            return self._rule(body.replace(quoted, '"', 1))
        first = body.split()[0]  # the rule of one call
        own = next(rule for rule in self._rules if rule.startswith(f"{first}: ")).partition(": ")[2]
        begun = self._rule(own.replace(f"{quoted}", '"'))
        return self._rule(body.replace(first, begun, 1))

    def _text_until(self, end: str) -> str:
        """Any text up to an ending, and that."""
        token = self._cut.search(end) if self._cut else None
        if token:  # which no letters of a text can be
            before = end[: token.start()]
            text = self._rule(f"{_TEXT} {json.dumps(before)}", "[lazy]") if before else _TEXT
            return f"{text} {self._literal(end[token.start() :])}"
        return self._rule(f"{_TEXT} {json.dumps(end)}", "[lazy]")

    def _schema(self, schema: Mapping[str, Any]) -> str:
        own = {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        return self._rule(f"%json {json.dumps(own)}")

    def _filled(self, text: str, places: Mapping[str, str]) -> str:
        """A text with its places filled by parts of the grammar."""
        parts = _PLACES.split(text)
        return " ".join(places[own] if at % 2 else self._literal(own) for at, own in enumerate(parts))

    def _literal(self, text: str) -> str:
        """Exactly this text, its markers as tokens."""
        pieces, at = [], 0
        for found in self._cut.finditer(text) if self._cut else ():
            pieces += [json.dumps(text[at : found.start()])] if found.start() > at else []
            pieces.append(f"<[{self._special[found[0]]}]>")
            at = found.end()
        pieces += [json.dumps(text[at:])] if at < len(text) else []
        return " ".join(pieces)
