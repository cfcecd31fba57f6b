"""Logits → token ids. A token depends on its logits, its request's parameters, tokens and position: on nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ts_parallel.runtime.step import Chunk, SamplingParams


def sample(logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
    """One token id a row.

    Args:
        logits: `[R, V]`, any float dtype.
        chunks: whose next token each row is; with the seed, the token's position makes the random number.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for row, chunk in enumerate(chunks):
        params = chunk.sampling
        if params.temperature == 0 and not params.changes_logits:
            continue
        own = adjust(logits[row].float(), chunk)
        tokens[row] = (
            _sample_row(own, params, uniform(params.seed, chunk.end)) if params.temperature else int(own.argmax())
        )
    return tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of `seed` and `position` alone: Philox (Salmon et al. 2011) is a function, not a state."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position))
    return float(generator.random())


def adjust(logits: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """The logits `[V]` after penalties and bias.

    Repetition: Keskar et al. 2019 (https://arxiv.org/abs/1909.05858); presence and frequency: OpenAI's API reference.
    """
    params = chunk.sampling
    if not params.changes_logits:
        return logits
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*chunk.prompt_ids, *chunk.output_ids}), device=logits.device)
        own = logits[seen]
        logits[seen] = torch.where(own > 0, own / params.repetition_penalty, own * params.repetition_penalty)
    if chunk.output_ids and (params.presence_penalty or params.frequency_penalty):
        for token_id, count in Counter(chunk.output_ids).items():
            logits[token_id] -= params.presence_penalty + params.frequency_penalty * count
    for token_id, bias in params.logit_bias:
        logits[token_id] += bias
    return logits


def _sample_row(logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    """Sampling by inversion of the cumulated sum over the tokens that are kept, the most likely first."""
    scaled, token_ids = (logits.double() / params.temperature).sort(descending=True, stable=True)
    probabilities = torch.softmax(scaled, dim=-1)
    kept = _keep(probabilities, params)
    cumulated = torch.where(kept, probabilities, 0).cumsum(dim=0)
    target = torch.tensor(number * float(cumulated[-1]), dtype=torch.float64, device=logits.device)
    chosen = int(torch.searchsorted(cumulated, target, right=True))
    last = int(kept.nonzero()[-1])
    return int(token_ids[min(chosen, last)])


def _keep(probabilities: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Which of the tokens, sorted by falling `probabilities` `[V]`, may be chosen; the first always may."""
    kept = torch.ones_like(probabilities, dtype=torch.bool)
    if params.top_k:
        kept[params.top_k :] = False
    if params.top_p < 1:
        # Nucleus (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751): the fewest that reach top_p together.
        own = _normalised(probabilities, kept)
        kept &= own.cumsum(dim=0) - own < params.top_p
        kept[0] = True
    if params.min_p > 0:
        # Nguyen et al. 2024 (https://arxiv.org/abs/2407.01082).
        kept &= probabilities >= params.min_p * probabilities[0]
    if params.typical_p < 1:
        kept = _typical(_normalised(probabilities, kept), kept, params.typical_p)
    return kept


def _typical(probabilities: torch.Tensor, kept: torch.Tensor, mass: float) -> torch.Tensor:
    """Locally typical sampling (Meister et al. 2022, https://arxiv.org/abs/2202.00666)."""
    surprise = -probabilities.log()
    expected = torch.where(kept, probabilities * surprise, 0).sum()
    distance = torch.where(kept, (surprise - expected).abs(), float("inf"))
    order = distance.argsort(stable=True)
    own = probabilities[order]
    chosen = own.cumsum(dim=0) - own < mass
    chosen[0] = True
    result = torch.zeros_like(kept)
    result[order[chosen]] = True
    return result & kept


def _normalised(probabilities: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    own = torch.where(kept, probabilities, 0)
    return own / own.sum()
