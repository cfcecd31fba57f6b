"""What every reader of tool calls says of the text that it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Begin:
    """A call of this function begins."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the JSON text of the arguments of the call that began last."""

    text: str


Part = Begin | Arguments
Schemas = Mapping[str, Mapping[str, Any]]
"""Functions that may be called → the JSON schemas of their arguments."""


class CallReader(ABC):
    """Reads one region of calls in pieces. Owns what it has not understood yet, so that no text is lost."""

    def __init__(self) -> None:
        self.has_begun = False
        """Whether any call was told of."""
        self.is_broken = False
        """Whether the region goes on with something that is no call."""
        self.unread = ""
        """Text that belongs to no call that was told of: where it is broken, and at the end, it is content."""

    @property
    def is_inside(self) -> bool:
        """Whether it stands inside a text of the arguments, in which a marker marks nothing."""
        return False

    @abstractmethod
    def add(self, text: str) -> list[Part]:
        """What more text tells."""

    @abstractmethod
    def end(self, is_cut: bool) -> list[Part]:
        """What the end of the region tells; then `unread` is what was no call.

        Args:
            is_cut: whether the answer ended there because it became too long.
        """


def overlap(text: str, ending: str) -> int:
    """How many of the last letters of `text` are the first of `ending`, not all of it."""
    return next((size for size in range(min(len(text), len(ending) - 1), 0, -1) if text.endswith(ending[:size])), 0)
