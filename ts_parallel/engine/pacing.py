"""How much of a prompt may join a step, so that those who wait for their next token hardly notice.

A step takes `base + tokens × cost`: the base is what its decoding requests need alone, the cost what each prompt token
adds. Both are learnt from the steps as they come. Knows numbers and seconds only.
"""

from __future__ import annotations

_FEWEST = 8  # tokens; a prompt must get on
_UNTIL_KNOWN = 32  # tokens, while the cost of one is not known
_WEIGHT = 0.2  # of the newest observation


class PrefillPacer:
    """Owns what was learnt of the steps' times."""

    def __init__(self, max_slowdown: float) -> None:
        """
        Args:
            max_slowdown: how many times as long a step with prompt tokens may take as one without.
        """
        self._max_slowdown = max_slowdown
        self._base: float | None = None
        self._cost: float | None = None

    def observe(self, num_decode: int, num_prefill: int, seconds: float) -> None:
        """A step of `num_decode` requests with one token each and `num_prefill` tokens of prompts took `seconds`."""
        if num_prefill == 0:
            self._base = _moved(self._base, seconds)
        elif num_decode == 0:
            self._cost = _moved(self._cost, seconds / num_prefill)
        elif self._base is not None:
            self._cost = _moved(self._cost, max(0.0, seconds - self._base) / num_prefill)

    def most_prefill_tokens(self) -> int:
        """How many prompt tokens may join a step in which others decode."""
        if self._base is None or not self._cost:
            return _UNTIL_KNOWN
        return max(_FEWEST, int((self._max_slowdown - 1) * self._base / self._cost))


def _moved(average: float | None, value: float) -> float:
    return value if average is None else (1 - _WEIGHT) * average + _WEIGHT * value
