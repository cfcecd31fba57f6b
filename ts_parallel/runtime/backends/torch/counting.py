"""The token of one row without a sort: its tokens are counted and weighed in ranges of their logits, and only a range
that a limit falls into is put in order. By numpy, as torch wakes all threads for each of the short passes.

V vocabulary, N tokens that are not negligible.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ts_parallel.step_plan import SamplingParams

_RANGES = 4096
# Beyond e^-50 of the best, all tokens of any vocabulary together are less than float64 tells apart.
_NEGLIGIBLE = 50.0


Reals = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def choose_by_counting(logits: npt.NDArray[np.float32], params: SamplingParams, number: float) -> int:
    """The token of a row `[V]` of finite maximum, by inversion of the cumulated sum over the tokens that are kept, the
    most likely first; typical_p is left out."""
    ranges = _Ranges(logits, params.temperature)
    if params.top_k:
        ranges.keep(params.top_k)
    if params.top_p < 1:
        # Nucleus (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751): the fewest that reach top_p together.
        ranges.keep(ranges.num_before(params.top_p * ranges.mass))
    if params.min_p > 0:
        # Nguyen et al. 2024 (https://arxiv.org/abs/2407.01082).
        ranges.keep(ranges.num_above(params.min_p))
    return ranges.token_at(number * ranges.mass)


class _Ranges:
    """Owns the tokens of a row in the order of their logits, as far as somebody has asked for it, and how many of the
    first are kept."""

    def __init__(self, logits: npt.NDArray[np.float32], temperature: float) -> None:
        best = float(logits.max())
        lowest = max(best - _NEGLIGIBLE * temperature, -3e38)  # within float32
        self._ids = np.flatnonzero(logits >= np.float32(lowest))  # [N]
        self._logits = logits[self._ids]
        weights = self._logits.astype(np.float64)
        weights -= best
        span = -float(weights.min())
        # Rounded or not, no two tokens change their order.
        self._places = np.minimum(weights * (-(_RANGES - 1) / span if span > 0 else 0), _RANGES - 1).astype(np.int64)
        weights /= temperature
        self._weights = np.exp(weights, out=weights)
        self._num_until = np.bincount(self._places, minlength=_RANGES).cumsum()
        self._mass_until = np.bincount(self._places, weights, minlength=_RANGES).cumsum()
        self._num_kept = len(self._ids)
        self.mass = float(self._mass_until[-1])
        """Of those that are kept."""

    def keep(self, number: int) -> None:
        """At most so many, and at least the first."""
        number = max(1, number)
        if number >= self._num_kept:
            return
        at = int(np.searchsorted(self._num_until, number))
        num_before, mass_before = self._before(at)
        _, until = self._ordered(at, mass_before)
        self._num_kept, self.mass = number, float(until[number - num_before - 1])

    def num_before(self, limit: float) -> int:
        """How many come until the limit is reached."""
        num_before, (_, until) = self._reach(limit, right=False)
        return num_before + int((until < limit).sum()) + 1

    def num_above(self, weight: float) -> int:
        return int(np.count_nonzero(self._weights >= weight))

    def token_at(self, target: float) -> int:
        """The first token with which the sum is above the target, at most the last that is kept."""
        num_before, (ids, until) = self._reach(target, right=True)
        place = int((until <= target).sum())
        return int(ids[min(place, self._num_kept - num_before - 1, len(ids) - 1)])

    def _reach(self, mass: float, *, right: bool) -> tuple[int, tuple[Ids, Reals]]:
        """How many tokens come before the range where the sum reaches `mass`, or goes beyond it, and that range's."""
        last = int(np.searchsorted(self._num_until, self._num_kept))
        at = min(int(np.searchsorted(self._mass_until, mass, "right" if right else "left")), last)
        num_before, mass_before = self._before(at)
        return num_before, self._ordered(at, mass_before)

    def _before(self, at: int) -> tuple[int, float]:
        return (int(self._num_until[at - 1]), float(self._mass_until[at - 1])) if at else (0, 0.0)

    def _ordered(self, at: int, mass_before: float) -> tuple[Ids, Reals]:
        """Ids of a range's tokens, the most likely first, and the sum up to and with each."""
        own = np.flatnonzero(self._places == at)
        own = own[np.argsort(-self._logits[own], kind="stable")]
        return self._ids[own], self._weights[own].cumsum() + mass_before
