"""The tokens of a step, chosen where its logits are: no answer is asked for but the tokens of all rows, once.

What each parameter does is in torch's `sampling`, whose tokens these are; only the order of a sum may be another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ts_parallel.runtime.backends.torch.penalties import adjust
from ts_parallel.runtime.backends.torch.sampling import choose_of, is_plain, limits_of, uniform
from ts_parallel.step_plan import Chunk, NoToken

_ROWS_AT_ONCE = 64  # whose vocabularies are sorted together, which takes some 40 bytes a token


def sample(logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
    """One token id a row of `[R, V]`, or why there is none (`NoToken`)."""
    tokens = _most_likely(logits)
    rows = [row for row, chunk in enumerate(chunks) if not is_plain(chunk)]
    if rows:
        changed = [chunks[row] for row in rows]
        places = _sent(rows, logits.device)
        before = tokens[places]
        after = _sample(logits[places].float(), changed)
        tokens[places] = torch.where(before == NoToken.NOT_A_NUMBER, before, after)
    found: list[int] = tokens.tolist()
    return found


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The first of each row's greatest logits, or a `NoToken`: int64 `[R]`."""
    greatest, best = logits.max(dim=-1)  # NaN is the greatest
    best = best.masked_fill(greatest == float("-inf"), NoToken.NOTHING_ALLOWED)
    return best.masked_fill(greatest.isnan(), NoToken.NOT_A_NUMBER)


def _sample(logits: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Of rows of their own, which are changed."""
    if any(chunk.sampling.changes_logits or chunk.allowed for chunk in chunks):
        adjust(logits, chunks)
    tokens = _most_likely(logits)
    drawn = [row for row, chunk in enumerate(chunks) if chunk.sampling.temperature]
    for first in range(0, len(drawn), _ROWS_AT_ONCE):
        rows = drawn[first : first + _ROWS_AT_ONCE]
        places = _sent(rows, logits.device)
        own = logits[places]
        # Beside plus infinity nothing counts, and where nothing is allowed nothing is drawn.
        has_chances = own.amax(dim=1).isfinite()
        tokens[places] = torch.where(has_chances, _draw(own, [chunks[row] for row in rows]), tokens[places])
    return tokens


def _draw(logits: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor:
    numbers = [uniform(chunk.sampling.seed, chunk.end) for chunk in chunks]
    limits = limits_of([chunk.sampling for chunk in chunks], numbers, logits.device)
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    every = torch.full((len(logits), 1), logits.shape[1], device=logits.device)
    return choose_of(values, ids, limits, every, None)


def _sent(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    """Without waiting for the device."""
    numbers = torch.tensor(rows)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers
