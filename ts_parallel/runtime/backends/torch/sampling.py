"""Logits → token ids. A token depends on its logits, its request's parameters, tokens and position: on nothing else.

R rows, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch

from ts_parallel.step_plan import Chunk, SamplingParams

# Of a prompt that is scored, each token is a row: this bounds what their log-probabilities need beside their logits.
_ROWS_AT_ONCE = 64


def most_likely(logits: torch.Tensor) -> list[int]:
    """The first of each row's greatest logits `[R, V]`."""
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


MostLikely = Callable[[torch.Tensor], list[int]]


def choose(logits: torch.Tensor, chunks: Sequence[Chunk], find_most_likely: MostLikely = most_likely) -> list[int]:
    """A step's result: the token of each sampled chunk, then the numbers that `step_plan.read_logprobs` reads.

    Args:
        logits: `[R, V]`, any float dtype: the rows of all chunks.
        find_most_likely: a backend's own `most_likely`.
    """
    ends = list(accumulate(chunk.num_rows for chunk in chunks))
    sampled = [(chunk, end - 1) for chunk, end in zip(chunks, ends, strict=True) if chunk.is_sampled]
    own = logits if len(sampled) == len(logits) else logits[[row for _, row in sampled]]
    tokens = sample(own, [chunk for chunk, _ in sampled], find_most_likely)
    numbers, chosen = list(tokens), iter(tokens)
    for chunk, end in zip(chunks, ends, strict=True):
        follow = [*chunk.next_ids, *([next(chosen)] if chunk.is_sampled else [])]
        if chunk.num_scores:
            numbers += score(logits[end - chunk.num_rows : end], follow, chunk.sampling.num_logprobs or 0)
    return numbers


def score(logits: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[int]:
    """For each row `[V]` and the token that follows it: how likely that one and the `num_top` most likely ones are.

    Returns:
        R × (1 + 2 K) numbers: the bits of one float64, K token ids, the bits of K float64.
    """
    numbers: list[int] = []
    following = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    for part, own in zip(torch.split(logits, _ROWS_AT_ONCE), torch.split(following, _ROWS_AT_ONCE), strict=True):
        logprobs = part.float().log_softmax(dim=-1)
        best = logprobs.topk(num_top)
        rows = torch.cat([_bits(logprobs.gather(1, own)), best.indices, _bits(best.values)], dim=1)
        numbers += rows.flatten().tolist()
    return numbers


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.double().view(torch.int64)


def sample(logits: torch.Tensor, chunks: Sequence[Chunk], find_most_likely: MostLikely = most_likely) -> list[int]:
    """One token id a row.

    Args:
        logits: `[R, V]`, any float dtype.
        chunks: whose next token each row is; with the seed, the token's position makes the random number.
    """
    tokens = find_most_likely(logits)
    for row, chunk in enumerate(chunks):
        params = chunk.sampling
        if params.temperature == 0 and not params.changes_logits and not chunk.allowed:
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
    """The logits `[V]` after penalties and bias, minus infinity where a token is not allowed.

    Repetition: Keskar et al. 2019 (https://arxiv.org/abs/1909.05858); presence and frequency: OpenAI's API reference.
    """
    params = chunk.sampling
    if not params.changes_logits and not chunk.allowed:
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
    if chunk.allowed:
        logits = logits.masked_fill(_forbidden(chunk.allowed, len(logits)).to(logits.device), float("-inf"))
    return logits


def _forbidden(allowed: bytes, num_bits: int) -> torch.Tensor:
    """bool `[num_bits]`: where there is no bit in `Chunk.allowed`."""
    bits = np.unpackbits(np.frombuffer(allowed, dtype=np.uint8), count=num_bits, bitorder="little")
    return torch.from_numpy(bits == 0)


def _sample_row(logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    """Sampling by inversion of the cumulated sum over the tokens that are kept, the most likely first."""
    ordered, token_ids = logits.double().sort(descending=True, stable=True)
    if not math.isfinite(ordered[0]):
        return int(token_ids[0])  # nothing is allowed, or nothing else counts: there are no probabilities
    # The best is 0 at any temperature, so however low that is, there is a best and nothing overflows.
    probabilities = torch.softmax((ordered - ordered[0]) / params.temperature, dim=-1)
    kept = _keep(probabilities, params)
    cumulated = torch.where(kept, probabilities, 0).cumsum(dim=0)
    target = torch.tensor(number * float(cumulated[-1]), dtype=torch.float64, device=logits.device)
    chosen = int(torch.searchsorted(cumulated, target, right=True))
    last = int(kept.nonzero()[-1])
    return int(token_ids[min(chosen, last)])


def _keep(probabilities: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Which of the tokens, sorted by falling `probabilities` `[V]`, may be chosen; the first always may."""
    kept = probabilities > 0  # what is forbidden has no share in what typical_p expects either
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
