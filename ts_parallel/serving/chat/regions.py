"""An answer's text cut into regions, by transformers' own streaming parser of `response_template`s.

The parser tells what is between markers; this also tells the markers, so that no text is lost: what one takes for a
call and cannot read is text after all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template


@dataclass(frozen=True)
class Opened:
    """A region begins by a marker; `captures` are the marker's named parts."""

    field: str
    marker: str
    captures: Mapping[str, str]


@dataclass(frozen=True)
class Text:
    """Text of the region."""

    field: str
    text: str


@dataclass(frozen=True)
class Closed:
    """A region that a marker had opened ends; without a marker where the answer does."""

    field: str
    marker: str


Event = Opened | Text | Closed


def text_template(spec: Mapping[str, Any]) -> ResponseTemplate:
    """A `response_template` whose fields hand their texts over as they are, letter by letter.

    Raises:
        ValueError: it is none.
    """
    load_response_template(dict(spec))  # of which transformers says what is wrong
    fields = {name: _as_text(field) for name, field in spec["fields"].items()}
    anchors = {key: value for key, value in spec.items() if key.startswith("start_anchor")}
    return load_response_template({**anchors, "fields": fields})


def _as_text(field: Mapping[str, Any]) -> dict[str, Any]:
    markers = {key: value for key, value in field.items() if key.startswith(("open", "close"))}
    return {**markers, "content": "text", "content_args": {"strip": False}, "transform": {"text": "{content}"}}


class Regions:
    """One answer. Owns transformers' parser, and how far into the text its events reach."""

    def __init__(self, template: ResponseTemplate, prompt: str) -> None:
        """
        Args:
            prompt: its text may open a region in which the answer begins.
        """
        self._template = template
        self._parser = ResponseParser(template, prefix=prompt)
        self._text = template.truncate_past_last_anchor(prompt) if prompt else ""
        self._at = 0
        self.begins_in: str | None = None
        """The field of the region that the prompt has opened."""
        for event in self._located(self._parser.initial_events):
            if isinstance(event, Opened):
                self.begins_in = event.field
            elif isinstance(event, Closed):
                self.begins_in = None

    def add(self, text: str) -> list[Event]:
        self._text += text
        return self._located(self._parser.feed(text))

    def end(self) -> list[Event]:
        _, events = self._parser.finalize()
        return self._located(events)

    def _located(self, events: list[dict[str, Any]]) -> list[Event]:
        """The parser's events with their markers: it skips them, so they are what its texts leave out."""
        located: list[Event] = []
        for event in events:
            name = event["field"]
            field = self._template.fields[name]
            if event["type"] == "region_chunk":
                text = event["text"]
                self._at = self._text.index(text, self._at) + len(text)
                located.append(Text(name, text))
            elif field.open_re is None:
                continue
            elif event["type"] == "region_open":
                found = field.open_re.search(self._text, self._at)
                self._at = found.end()
                captures = {key: value for key, value in found.groupdict().items() if value is not None}
                located.append(Opened(name, found[0], captures))
            else:
                found = field.close_re.match(self._text, self._at) if field.close_re is not None else None
                self._at += len(found[0]) if found else 0
                located.append(Closed(name, found[0] if found else ""))
        return located
