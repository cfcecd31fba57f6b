"""Where an answer ends because a text occurs in it, be it across tokens; no part of that text gets out before."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one answer. Holds back what may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str], is_included: bool = False) -> None:
        self._stops = stops
        self._is_included = is_included
        self._held = ""
        self.has_stopped = False

    @property
    def is_watching(self) -> bool:
        """Whether there is anything to stop at."""
        return bool(self._stops)

    def add(self, text: str, is_last: bool) -> str:
        """The text that may go out now; nothing more after a stop string. With `is_last`, nothing is held back."""
        text = self._held + text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, _, stop = min(found)  # the first, and of several that begin there the longest
            self.has_stopped, self._held = True, ""
            return text[: at + len(stop)] if self._is_included else text[:at]
        num_held = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """How many of the last letters of `text` are the first of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
