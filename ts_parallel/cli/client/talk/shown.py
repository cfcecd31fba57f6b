"""An answer on a terminal or in a file, as it comes."""

from __future__ import annotations

import os
import sys

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Shown:
    """Prints one answer. What a model thinks before it is shown to persons alone, dimmed where colours may be."""

    def __init__(self) -> None:
        self._shows_thoughts = sys.stdout.isatty()
        self._dims = self._shows_thoughts and not os.environ.get("NO_COLOR")
        self._is_thinking = False
        self._is_empty = True

    def add(self, text: str, thought: str = "") -> None:
        if thought and self._shows_thoughts:
            if not self._is_thinking:
                self._write(("" if self._is_empty else "\n") + (_DIM if self._dims else ""))
                self._is_thinking = True
            self._write(thought)
        if text:
            if self._is_thinking:
                self._write(f"{_PLAIN if self._dims else ''}\n\n")
                self._is_thinking = False
            self._write(text)

    def end(self) -> None:
        """A line end, whatever came."""
        self._write((_PLAIN if self._is_thinking and self._dims else "") + "\n")

    def break_off(self) -> None:
        """The same of an answer that an error ends: nothing where nothing came."""
        if not self._is_empty:
            self.end()

    def _write(self, text: str) -> None:
        if text:
            self._is_empty = False
            print(text, end="", flush=True)
