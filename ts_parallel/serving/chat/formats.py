"""In which format a chat model writes reasoning and tool calls: its tokenizer says so, or a family's file does.

A family is a file of `families/`: `signs`, lists of texts of which one must be in the chat template or among the added
tokens; `fields`, those of a `response_template` of transformers'; `calls`, how to read what stands between the markers
of a call; `written`, how the model is made to write one (`enforce.py`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from ts_parallel.config import did_you_mean
from ts_parallel.errors import ConfigError
from ts_parallel.serving.chat.calls.base import CallReader, Schemas
from ts_parallel.serving.chat.calls.json_calls import JsonCalls
from ts_parallel.serving.chat.calls.tagged_calls import TaggedCalls, Tags
from ts_parallel.serving.chat.calls.whole_calls import WholeCalls
from ts_parallel.serving.chat.regions import text_template
from ts_parallel.serving.text.token_texts import special_ids_of

_HERE = Path(__file__).parent
_ANYWHERE = "json"
"""The family for models that have none, where they are made to call: it has no sign."""
CALLS = "tool_calls"
REASONING = ("reasoning_content", "reasoning", "thinking")
_OWN_TEMPLATE = "response_template"  # the name of a format that the tokenizer itself describes
_NO_ANCHOR = "\x00"  # in no prompt: what is handed over begins where the answer's turn does


@dataclass(frozen=True)
class ChatFormat:
    """One format. Knows how its regions are marked, and makes readers of its calls."""

    name: str
    reason: str
    """Why it was taken."""
    fields: Mapping[str, Any]
    """Those of a `response_template`."""
    calls: Mapping[str, Any] | None = None
    """How a region of calls is read in pieces; None: whole, as its field says."""
    written: Mapping[str, Any] | None = None
    """How calls are enforced; None where they cannot be."""
    id_length: int | None = None
    """Of a call's id, where the family's templates take no other."""
    anchors: Mapping[str, Any] = field(default_factory=lambda: {"start_anchor": _NO_ANCHOR})

    @property
    def reasons(self) -> bool:
        return any(name in self.fields for name in REASONING)

    @property
    def reasoning_markers(self) -> tuple[str, str] | None:
        """The texts that reasoning stands between; None where it is marked otherwise."""
        for name in REASONING:
            begin, end = (self.fields.get(name, {}).get(key) for key in ("open", "close"))
            if isinstance(begin, str) and isinstance(end, str):
                return begin, end
        return None

    def regions(self, *, with_calls: bool, with_reasoning: bool) -> ResponseTemplate | None:
        """How an answer is cut; None where it need not be."""
        return self._regions[with_calls and CALLS in self.fields, with_reasoning and self.reasons]

    @cached_property
    def _regions(self) -> dict[tuple[bool, bool], ResponseTemplate | None]:
        kinds = {}
        for with_calls in (False, True):
            for with_reasoning in (False, True):
                left_out = {*(() if with_calls else (CALLS,)), *(() if with_reasoning else REASONING)}
                own = {name: value for name, value in self.fields.items() if name not in left_out}
                has_any = with_calls or with_reasoning
                kinds[with_calls, with_reasoning] = text_template({**self.anchors, "fields": own}) if has_any else None
        return kinds

    @property
    def reads_prompt(self) -> bool:
        """Whether its own anchors say where in a prompt the answer's turn begins."""
        return _NO_ANCHOR not in self.anchors.values()

    def call_reader(self, captures: Mapping[str, str], schemas: Schemas, tools: list[dict[str, Any]]) -> CallReader:
        """For one region of calls, whose opening said the `captures`."""
        if self.calls is None:
            return WholeCalls(self.fields[CALLS], captures, tools)
        options = {key: value for key, value in self.calls.items() if key != "reader"}
        if self.calls["reader"] == "tagged":
            return TaggedCalls(Tags(**options), schemas)
        return JsonCalls(schemas, **options)

    def marker_ids(self, special: Mapping[int, str]) -> frozenset[int]:
        """The special tokens that are markers: without them in the text nothing could be cut."""
        texts = list(_texts({"fields": self.fields, "calls": self.calls}))
        is_in = {name: any(name in own or _quoted(name) in own for own in texts) for name in special.values() if name}
        return frozenset(token_id for token_id, name in special.items() if is_in.get(name))

    def opening_of(self, prompt: str, continued: str | None) -> str:
        """What of a prompt belongs to the answer: reasoning that the template has begun.

        Args:
            continued: the last message, where the answer goes on with it.
        """
        if self.reads_prompt:
            return prompt
        if self.reasoning_markers is None:
            return ""
        begin, end = self.reasoning_markers
        at = prompt.rfind(begin)
        if at >= 0 and not prompt[at + len(begin) :].strip():
            return prompt[at:]
        return (
            continued[continued.rfind(begin) :] if continued and continued.rfind(begin) > continued.rfind(end) else ""
        )


def choose_format(tokenizer: Any, wanted: str) -> ChatFormat | None:
    """The format of a tokenizer's model, or the family that is `wanted`; None where there is none to be seen.

    Args:
        wanted: `auto`, `none` or a family's name.

    Raises:
        ConfigError: there is no such family, or the tokenizer's own template is none.
    """
    if wanted == "none":
        return None
    seen = _seen_texts(tokenizer)
    if wanted != "auto":
        return _of_family(wanted, f"chat_format is {wanted}", seen)
    own = getattr(tokenizer, _OWN_TEMPLATE, None)
    if own is not None:
        return _described(own)
    name, reason = _nearest(seen)
    if name is not None:
        return _of_family(name, reason, seen)
    markers = _reasoning_markers(seen)
    if markers is None:
        return None
    fields = {"reasoning_content": {"open": markers[0], "close": markers[1]}, "content": {"content": "text"}}
    return ChatFormat("reasoning", f"{markers[0]!r} is {_where(markers[0], seen)}", fields)


def format_for_all(tokenizer: Any) -> ChatFormat:
    """Bare JSON, which any model can be made to write."""
    return _of_family(_ANYWHERE, "calls are asked for", _seen_texts(tokenizer))


def nearest_family(tokenizer: Any) -> ChatFormat | None:
    """The family that a tokenizer shows signs of, be it that it also describes its format itself."""
    seen = _seen_texts(tokenizer)
    name, reason = _nearest(seen)
    return None if name is None else _of_family(name, reason, seen)


def family_names() -> list[str]:
    return sorted(path.stem for path in (_HERE / "families").glob("*.json"))


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Those that show in no text, with their names."""
    return {token_id: tokenizer.convert_ids_to_tokens(token_id) for token_id in special_ids_of(tokenizer)}


Seen = tuple[str, Collection[str]]
"""A chat template, and the added tokens' texts."""


def template_text(tokenizer: Any) -> str:
    """Of all its chat templates."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(map(str, template.values()))


def _seen_texts(tokenizer: Any) -> Seen:
    return template_text(tokenizer), frozenset(tokenizer.get_added_vocab())


def _where(sign: str, seen: Seen) -> str:
    return "in the chat template" if sign in seen[0] else "an added token"


def _nearest(seen: Seen) -> tuple[str | None, str]:
    """The family of which most signs are seen: those of the template count more, for vocabularies are inherited."""
    best: tuple[tuple[int, int, int], str | None, str] = ((0, 0, 0), None, "")
    for name in family_names():
        for signs in _family(name)["signs"]:
            if all(sign in seen[0] or sign in seen[1] for sign in signs):
                rank = (sum(sign in seen[0] for sign in signs), len(signs), sum(map(len, signs)))
                reason = ", ".join(f"{sign!r} is {_where(sign, seen)}" for sign in signs)
                best = max(best, (rank, name, reason), key=lambda own: own[0])
    return best[1], best[2]


def _of_family(name: str, reason: str, seen: Seen) -> ChatFormat:
    if name not in family_names():
        known = ", ".join(family_names())
        hint = did_you_mean(name, dict.fromkeys(family_names(), None))
        raise ConfigError(f"handler key 'chat_format': {name!r} is none{hint}: there are auto, none, {known}")
    family = _family(name)
    fields = dict(family["fields"])
    markers = _reasoning_markers(seen)
    if markers is not None and not any(own in fields for own in REASONING):
        fields["reasoning_content"] = {"open": markers[0], "close": markers[1]}
    return ChatFormat(name, reason, fields, family.get("calls"), family["written"], family.get("id_length"))


def _described(own: Any) -> ChatFormat:
    try:
        text_template(own)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"the tokenizer's response_template is none: {error}; handler key 'chat_format' may name a family instead"
        ) from None
    anchors = {key: value for key, value in own.items() if key.startswith("start_anchor")}
    return ChatFormat(_OWN_TEMPLATE, "the tokenizer has one of its own", own["fields"], anchors=anchors)


def _reasoning_markers(seen: Seen) -> tuple[str, str] | None:
    for begin, end in json.loads((_HERE / "reasoning.json").read_text())["markers"]:
        if all(own in seen[0] or own in seen[1] for own in (begin, end)):
            return begin, end
    return None


@cache
def _family(name: str) -> dict[str, Any]:
    family: dict[str, Any] = json.loads((_HERE / "families" / f"{name}.json").read_text())
    return family


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for own in value.values():
            yield from _texts(own)
    elif isinstance(value, list | tuple):
        for own in value:
            yield from _texts(own)


def _quoted(name: str) -> str:
    """As an expression has it."""
    return "".join(f"\\{letter}" if letter in "|[](){}.*+?^$\\" else letter for letter in name)
