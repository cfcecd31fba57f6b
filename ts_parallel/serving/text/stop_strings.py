"""Where an answer ends because a text occurs in it, be it across tokens; no part of that text gets out before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise


class StopStrings:
    """Watches one answer. Holds back what may be the beginning of a stop string.

    A stop string may hold the names of special tokens, which an answer does not show: they are looked for where the
    tokens stand, and do not get out.
    """

    def __init__(
        self, stops: Sequence[str], is_included: bool = False, special_names: Mapping[int, str] | None = None
    ) -> None:
        """
        Args:
            special_names: tokens that show in no text, with the texts that stand for them.
        """
        self._stops = stops
        self._is_included = is_included
        names = (special_names or {}).items()
        self._names = {token_id: name for token_id, name in names if any(name in stop for stop in stops)}
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # where in what is held names stand
        self.has_stopped = False

    @property
    def is_watching(self) -> bool:
        """Whether there is anything to stop at."""
        return bool(self._stops)

    def add(self, text: str, is_last: bool, token_id: int | None = None, may_stop: bool = True) -> str:
        """The text that may go out now; nothing more after a stop string. With `is_last`, nothing is held back.

        Args:
            token_id: the token whose text it is, where it is one's.
            may_stop: whether a stop string that ends in it counts.
        """
        text = self._held + text
        if token_id is not None and (name := self._names.get(token_id)) is not None:
            self._hidden.append((len(text), len(text) + len(name)))
            text += name
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0] if may_stop else []
        if found:
            at, _, stop = min(found)  # the first, and of several that begin there the longest
            self.has_stopped, self._held = True, ""
            return self._shown(text[: at + len(stop)] if self._is_included else text[:at])
        num_held = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        out = len(text) - num_held
        shown, self._held = self._shown(text[:out]), text[out:]
        self._hidden = [(max(0, begin - out), end - out) for begin, end in self._hidden if end > out]
        return shown

    def _shown(self, text: str) -> str:
        if not self._hidden:
            return text
        edges = [0, *(at for span in self._hidden for at in span), len(text)]
        return "".join(text[begin:end] for begin, end in list(pairwise(edges))[::2])


def _overlap(text: str, stop: str) -> int:
    """How many of the last letters of `text` are the first of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
