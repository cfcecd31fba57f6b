"""Logits → token ids. A token depends on its logits, its request's parameters, tokens and position: on nothing else.

All rows of a step at once, and yet each by itself: no row's arithmetic knows how many others there are.

R rows, V vocabulary, K most likely tokens, N tokens of a row that are looked at, the most likely first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from ts_parallel.runtime.backends.torch.counting import choose_by_counting
from ts_parallel.runtime.backends.torch.penalties import adjust
from ts_parallel.step_plan import Chunk, NoToken, SamplingParams

# Of a prompt that is scored, each token is a row: this bounds what their log-probabilities need beside their logits.
_ROWS_AT_ONCE = 64
# So many of the most likely tokens are looked at first. They hold what most rows choose from.
_FEW = 256

# A row in so many slices, of which the greatest at each place says which places are worth looking at.
_SLICES = 32
# Below it, exponentials take several times as long, and are nothing beside 1 all the same.
_LOWEST = -700.0

Sampler = Callable[[torch.Tensor, Sequence[Chunk]], list[int]]


def choose(logits: torch.Tensor, chunks: Sequence[Chunk], sampler: Sampler | None = None) -> list[int]:
    """A step's result: the token of each sampled chunk, then the numbers that `step_plan.read_logprobs` reads.

    Args:
        logits: `[R, V]`, any float dtype: the rows of all chunks.
        sampler: a backend's own `sample`.
    """
    ends = list(accumulate(chunk.num_rows for chunk in chunks))
    sampled = [(chunk, end - 1) for chunk, end in zip(chunks, ends, strict=True) if chunk.is_sampled]
    own = logits if len(sampled) == len(logits) else logits[[row for _, row in sampled]]
    tokens = (sampler or sample)(own, [chunk for chunk, _ in sampled])
    numbers, chosen = list(tokens), iter(tokens)
    for chunk, end in zip(chunks, ends, strict=True):
        # Where there is no token, nobody reads how likely it was.
        follow = [*chunk.next_ids, *([max(0, next(chosen))] if chunk.is_sampled else [])]
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


def sample(logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
    """One token id a row, or why there is none (`NoToken`).

    Args:
        logits: `[R, V]`, any float dtype.
        chunks: whose next token each row is; with the seed, the token's position makes the random number.
    """
    tokens, _ = _most_likely(logits)
    rows = [row for row, chunk in enumerate(chunks) if tokens[row] != NoToken.NOT_A_NUMBER and not is_plain(chunk)]
    if not rows:
        return tokens
    changed = [chunks[row] for row in rows]
    own = (logits if len(rows) == len(logits) else logits[rows]).float()
    if any(chunk.sampling.changes_logits or chunk.allowed for chunk in changed):
        own = own.clone() if own.data_ptr() == logits.data_ptr() else own  # the model's own are scored afterwards
        adjust(own, changed)
    best, is_drawn = _most_likely(own)
    drawn = [at for at, chunk in enumerate(changed) if is_drawn[at] and chunk.sampling.temperature]
    if drawn:
        settings = [changed[at].sampling for at in drawn]
        numbers = [uniform(changed[at].sampling.seed, changed[at].end) for at in drawn]
        every = own if len(drawn) == len(own) else own[drawn]
        for at, token in zip(drawn, _draw(every, settings, numbers), strict=True):
            best[at] = token
    for row, token in zip(rows, best, strict=True):
        tokens[row] = token
    return tokens


def is_plain(chunk: Chunk) -> bool:
    """Whether its next token is the most likely one of the model's own logits."""
    return chunk.sampling.temperature == 0 and not chunk.sampling.changes_logits and not chunk.allowed


def _most_likely(logits: torch.Tensor) -> tuple[list[int], list[bool]]:
    """The first of each row's greatest logits `[R, V]`, or a `NoToken`, and whether there are probabilities at all:
    beside plus infinity nothing counts."""
    greatest, best = logits.max(dim=-1)  # NaN is the greatest
    best = best.masked_fill(greatest == float("-inf"), NoToken.NOTHING_ALLOWED)
    best = best.masked_fill(greatest.isnan(), NoToken.NOT_A_NUMBER)
    return best.tolist(), greatest.isfinite().tolist()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of `seed` and `position` alone: Philox (Salmon et al. 2011) is a function, not a state."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64, counter=position))
    return float(generator.random())


_COLUMNS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "number")


@dataclass(frozen=True)
class Limits:
    """What each row `[R, 1]` is drawn from, and by what number: float64."""

    temperature: torch.Tensor
    top_k: torch.Tensor  # infinite where there is none
    top_p: torch.Tensor
    min_p: torch.Tensor
    typical_p: torch.Tensor
    number: torch.Tensor
    has_typical: bool
    """Whether `typical_p` is below 1 anywhere."""

    def of(self, rows: list[int]) -> Limits:
        columns = [getattr(self, name)[rows] for name in _COLUMNS]
        return Limits(**dict(zip(_COLUMNS, columns, strict=True)), has_typical=self.has_typical)


def limits_of(settings: Sequence[SamplingParams], numbers: Sequence[float], device: torch.device) -> Limits:
    """Of one row each, drawn by `numbers`; in one copy."""
    rows = [
        (own.temperature, own.top_k or math.inf, own.top_p, own.min_p, own.typical_p, number)
        for own, number in zip(settings, numbers, strict=True)
    ]
    every = torch.tensor(rows, dtype=torch.float64)
    if device.type == "cuda":
        every = every.pin_memory().to(device, non_blocking=True)
    columns = zip(_COLUMNS, torch.split(every, 1, dim=1), strict=True)
    return Limits(**dict(columns), has_typical=any(own.typical_p < 1 for own in settings))


def _draw(logits: torch.Tensor, settings: Sequence[SamplingParams], numbers: Sequence[float]) -> list[int]:
    """The token of each row of finite maximum `[R, V]`, float32: of the few most likely ones, where they are enough to
    know it, else of all."""
    num_tokens = logits.shape[1]
    limits = limits_of(settings, numbers, logits.device)
    chosen = torch.full((len(logits),), -1, device=logits.device)
    if num_tokens > _FEW:
        values, ids = _few(logits)
        # Of the tokens that share the last number, some may be outside.
        num_sure = (values > values[:, -1:]).sum(dim=1, keepdim=True)
        mass = torch.tensor(_masses(logits, settings), dtype=torch.float64, device=logits.device).unsqueeze(1)
        chosen = choose_of(values, ids, limits, num_sure, mass)
    tokens: list[int] = chosen.tolist()
    if rows := [row for row, token in enumerate(tokens) if token < 0 and _is_to_be_sorted(logits, settings[row])]:
        values, ids = logits[rows].sort(dim=1, descending=True, stable=True)
        all_of_them = torch.full((len(rows), 1), num_tokens, device=logits.device)
        for row, token in zip(rows, choose_of(values, ids, limits.of(rows), all_of_them, None).tolist(), strict=True):
            tokens[row] = token
    for row, token in enumerate(tokens):
        if token < 0:
            tokens[row] = choose_by_counting(logits[row].numpy(), settings[row], numbers[row])
    return tokens


def _is_to_be_sorted(logits: torch.Tensor, params: SamplingParams) -> bool:
    """Few tokens are, and all where they are wanted in another order; a GPU sorts sooner than it answers questions."""
    return logits.shape[1] <= _FEW or params.typical_p < 1 or logits.device.type != "cpu"


def _few(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids `[R, N]` of the most likely tokens of each row, of equal ones the lower id first; of those that
    have the last value any."""
    values, ids = logits, None
    width = logits.shape[1] // _SLICES
    if width > _FEW:
        # A token that is above the N-th is in one of the N columns whose greatest numbers are the greatest.
        columns = logits[:, : width * _SLICES].reshape(-1, _SLICES, width).amax(dim=1).topk(_FEW, dim=1).indices
        down = torch.arange(_SLICES, device=logits.device) * width
        rest = torch.arange(width * _SLICES, logits.shape[1], device=logits.device).expand(len(logits), -1)
        ids = torch.cat([(columns.unsqueeze(1) + down.unsqueeze(1)).flatten(1), rest], dim=1)
        values = logits.gather(1, ids)
    values, places = values.topk(_FEW, dim=1)
    ids, order = (places if ids is None else ids.gather(1, places)).sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _masses(logits: torch.Tensor, settings: Sequence[SamplingParams]) -> list[float]:
    """The weights of all tokens of each row `[R, V]` together, where they may be needed, else NaN. Row by row, for the
    order of a sum depends on the shape; on a CPU by numpy, as torch wakes all threads for each of the short passes."""
    room = np.empty(logits.shape[1])
    masses = []
    for row, params in zip(logits, settings, strict=True):
        if params.top_k or (params.top_p >= 1 and params.min_p > 0):
            masses.append(math.nan)
        elif logits.device.type == "cpu":
            np.copyto(room, row.numpy())
            np.subtract(room, room.max(), out=room)
            np.divide(room, params.temperature, out=room)
            np.exp(np.maximum(room, _LOWEST, out=room), out=room)
            masses.append(float(room.sum()))
        else:
            own = row.double().sub_(float(row.max())).div_(params.temperature).clamp_(min=_LOWEST)
            masses.append(float(own.exp_().sum()))
    return masses


def choose_of(
    values: torch.Tensor,  # [R, N], falling; equal ones by rising id
    ids: torch.Tensor,  # [R, N]
    limits: Limits,
    num_sure: torch.Tensor,  # [R, 1], so many of them are the first of all tokens
    mass: torch.Tensor | None,  # [R, 1], the weights of all tokens; None where all are here
) -> torch.Tensor:
    """The token id of each row, int64 `[R]`, by inversion of the cumulated sum over the tokens that are kept, the most
    likely first; -1 where it takes more than the sure ones to know it."""
    # The best is 0 at any temperature, so however low that is, there is a best and nothing overflows.
    weights = ((values.double() - values[:, :1].double()) / limits.temperature).exp()
    places = torch.arange(values.shape[1], device=values.device)
    kept = (weights > 0) & (places < num_sure) & (places < limits.top_k)
    cumulated = _cumulated(weights, kept)
    is_cut = limits.top_k <= num_sure
    before_top_p = cumulated[:, -1:] if mass is None else torch.where(is_cut, cumulated[:, -1:], mass)
    kept &= _is_within(cumulated, limits.top_p * before_top_p) | (limits.top_p >= 1)
    # Nguyen et al. 2024 (https://arxiv.org/abs/2407.01082).
    kept &= weights >= limits.min_p
    kept[:, 0] = True
    if mass is None:
        chosen = _typical(weights, kept, limits.typical_p) if limits.has_typical else kept
        cumulated = _cumulated(weights, chosen)
        return ids.gather(1, _invert(cumulated, limits.number * cumulated[:, -1:])).squeeze(1)
    is_all = torch.isinf(limits.top_k)
    is_cut |= is_all & (kept.sum(dim=1, keepdim=True) < num_sure)
    cumulated = _cumulated(weights, kept)
    target = limits.number * torch.where(is_cut, cumulated[:, -1:], mass)
    # Where everything may come, it is enough that what comes is among the sure ones.
    is_open = is_all & (limits.top_p >= 1) & (limits.min_p <= 0)
    is_known = (is_cut | (is_open & (cumulated[:, -1:] > target))) & (limits.typical_p >= 1) & (num_sure > 0)
    return torch.where(is_known, ids.gather(1, _invert(cumulated, target)), -1).squeeze(1)


def _is_within(cumulated: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Nucleus (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751): the fewest that reach the limit together."""
    return torch.cat([torch.zeros_like(limit), cumulated[:, :-1]], dim=1) < limit


def _invert(cumulated: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first place `[R, 1]` whose sum is above the target, at most the last that adds to it."""
    last = (cumulated < cumulated[:, -1:]).sum(dim=1, keepdim=True)
    return torch.searchsorted(cumulated, target, right=True).minimum(last)


def _cumulated(weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.where(kept, weights, 0).cumsum(dim=1)


def _typical(weights: torch.Tensor, kept: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Locally typical sampling (Meister et al. 2022, https://arxiv.org/abs/2202.00666): bool `[R, N]`."""
    probabilities = torch.where(kept, weights, 0)
    probabilities = probabilities / probabilities.sum(dim=1, keepdim=True)
    surprise = -probabilities.log()
    expected = torch.where(kept, probabilities * surprise, 0).sum(dim=1, keepdim=True)
    distance = torch.where(kept, (surprise - expected).abs(), float("inf"))
    order = distance.argsort(dim=1, stable=True)
    own = probabilities.gather(1, order)
    chosen = own.cumsum(dim=1) - own < mass
    chosen[:, 0] = True
    return torch.zeros_like(kept).scatter_(1, order, chosen) & kept | (kept & (mass >= 1))
