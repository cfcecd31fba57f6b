"""What a pickle must not be able to do: call a function when it is read."""

from __future__ import annotations

from collections.abc import Callable


class Malicious:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.made = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.made
