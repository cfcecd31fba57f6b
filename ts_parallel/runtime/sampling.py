"""Logits → token ids. A token depends on its logits, its request's parameters and its position: on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ts_parallel.runtime.step import SamplingParams


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """One token id a row.

    Args:
        logits: `[R, V]`, any float dtype.
        params: of each row.
        positions: of the token that is chosen, in its request; with the seed it makes the random number.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for row, (own, position) in enumerate(zip(params, positions, strict=True)):
        if own.temperature > 0:
            tokens[row] = _sample_row(logits[row], own, uniform(own.seed, position))
    return tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of `seed` and `position` alone: Philox (Salmon et al. 2011) is a function, not a state."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position))
    return float(generator.random())


def _sample_row(logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    """Nucleus sampling (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751) by inversion of the cumulated sum."""
    probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
    ordered, token_ids = probabilities.sort(descending=True, stable=True)
    cumulated = ordered.cumsum(dim=0)
    # The nucleus is the fewest most likely tokens that reach top_p together: those before which it is not reached.
    num_kept = max(1, int(((cumulated - ordered) < params.top_p).sum())) if params.top_p < 1 else len(ordered)
    target = torch.tensor(number * float(cumulated[num_kept - 1]), dtype=torch.float64, device=logits.device)
    chosen = int(torch.searchsorted(cumulated[:num_kept], target, right=True))
    return int(token_ids[min(chosen, num_kept - 1)])
