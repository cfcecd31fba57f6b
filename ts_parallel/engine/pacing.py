"""How much of prompts may join a step, so that those who wait for their next token hardly notice.

A step takes `base + tokens × cost`: the base is what its decoding requests need alone, the cost what each prompt token
adds. Both are learnt from the steps as they come. One prompt may make a step `max_slowdown` times as long; each of
several may add as much, until a step is a few times as long or so long as a reader notices. Knows numbers and seconds.
"""

from __future__ import annotations

_FEWEST = 16  # tokens; a prompt must get on, and fewer take hardly less time
_UNTIL_KNOWN = 32  # tokens, while the cost of one is not known
_WEIGHT = 0.2  # of the newest observation
_SLOWDOWN_OF_SEVERAL = 2.5  # below 3, where the slowest step in a hundred is to be within three times the usual one
_UNNOTICED = 0.06  # seconds; text that comes 16 times a second flows


class PrefillPacer:
    """Owns what was learnt of the steps' times."""

    def __init__(self, max_slowdown: float) -> None:
        """
        Args:
            max_slowdown: how many times as long a step may take with tokens of one prompt as without.
        """
        self._max_slowdown = max_slowdown
        self._base: float | None = None
        self._extra: float | None = None
        """Seconds that prompts have added to a step."""
        self._tokens: float | None = None
        """How many tokens of prompts it had: the average of both, so that a cost counts by its tokens."""

    def observe(self, num_decode: int, num_prefill: int, seconds: float) -> None:
        """A step of `num_decode` requests with one token each and `num_prefill` tokens of prompts took `seconds`."""
        if num_prefill == 0:
            self._base = _moved(self._base, seconds)
        elif num_decode == 0:
            self._learn_cost(seconds, num_prefill)
        elif self._base is not None:
            self._learn_cost(max(0.0, seconds - self._base), num_prefill)

    def most_prefill_tokens(self, num_prompts: int) -> int:
        """How many tokens of so many prompts may join a step in which others decode."""
        if self._base is None or not self._extra or not self._tokens:
            return _UNTIL_KNOWN * num_prompts
        most = max((max(self._max_slowdown, _SLOWDOWN_OF_SEVERAL) - 1) * self._base, _UNNOTICED - self._base)
        seconds = min((self._max_slowdown - 1) * self._base * num_prompts, most)
        return max(_FEWEST, int(seconds * self._tokens / self._extra))

    def _learn_cost(self, seconds: float, num_tokens: int) -> None:
        self._extra, self._tokens = _moved(self._extra, seconds), _moved(self._tokens, num_tokens)


def _moved(average: float | None, value: float) -> float:
    return value if average is None else (1 - _WEIGHT) * average + _WEIGHT * value
