"""Attention over paged KV memory, for the packed tokens of one step.

T tokens of the step, B decoding sequences, N new tokens of one sequence, L its length, G query heads of a key/value
head; H, KV, D, E as in `AttentionSite`. Sequences that add one token run together, padded to the longest; the others
one by one. PagedAttention: Kwon et al. 2023 (https://arxiv.org/abs/2309.06180).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ts_parallel.partition.program import AttentionSite
from ts_parallel.runtime.backends.kv_memory import KVMemory
from ts_parallel.runtime.backends.torch.norms import rotary
from ts_parallel.step_plan import Chunk, StepPlan


class _Mask:
    """Which keys each query sees, for every window that a model's sites have; made once a step, not once a site."""

    def __init__(self, distance: torch.Tensor) -> None:
        """`distance` is how far each key lies behind its query: negative ahead of it, and where padded."""
        self._distance = distance
        self._of: dict[int | None, torch.Tensor] = {}

    def of(self, window: int | None) -> torch.Tensor:
        """True where a key is less than `window` behind, of the distance's shape."""
        if window not in self._of:
            seen = self._distance >= 0
            self._of[window] = seen if window is None else seen & (self._distance < window)
        return self._of[window]


@dataclass(frozen=True)
class _Decode:
    """All sequences that add one token."""

    rows: torch.Tensor  # [B], their tokens among the step's
    slots: torch.Tensor  # [B × longest], the slots they read; padding reads the sequence's own first
    mask: _Mask  # of [B, longest]


@dataclass(frozen=True)
class _Prefill:
    """One sequence that adds several tokens."""

    rows: slice  # its tokens among the step's
    slots: torch.Tensor | None  # [L], None where all its tokens are new
    mask: _Mask  # of [N, L]


@dataclass(frozen=True)
class PagedLayout:
    """A step plan as tensors."""

    token_ids: torch.Tensor  # [1, T]
    positions: torch.Tensor  # [1, T]
    sampled_rows: torch.Tensor  # [R], the tokens whose logits are wanted
    slots: torch.Tensor  # [T], where each token's key and value are written
    decode: _Decode | None
    prefills: tuple[_Prefill, ...]


def lay_out(plan: StepPlan, block_size: int, device: torch.device) -> PagedLayout:
    """The tensors that every attention site of a step shares."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sampled: list[int] = []
    decodes: list[tuple[int, list[int]]] = []
    prefills: list[_Prefill] = []
    for chunk in plan.chunks:
        first = len(token_ids)
        own = _slots(chunk, block_size)
        token_ids += chunk.token_ids
        positions += range(chunk.start, chunk.end)
        slots += own[chunk.start :]
        sampled += range(first, first + len(chunk.next_ids))
        if chunk.is_sampled:
            sampled.append(len(token_ids) - 1)
        if len(chunk.token_ids) == 1:
            decodes.append((first, own))
        else:
            prefills.append(_lay_out_prefill(chunk, own, slice(first, len(token_ids)), device))

    def tensor(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    return PagedLayout(
        token_ids=tensor(token_ids).unsqueeze(0),
        positions=tensor(positions).unsqueeze(0),
        sampled_rows=tensor(sampled),
        slots=tensor(slots),
        decode=_lay_out_decodes(decodes, device) if decodes else None,
        prefills=tuple(prefills),
    )


def _slots(chunk: Chunk, block_size: int) -> list[int]:
    """The slot of each of a sequence's tokens, up to the chunk's end."""
    return [block * block_size + offset for block in chunk.block_ids for offset in range(block_size)][: chunk.end]


def _lay_out_decodes(decodes: list[tuple[int, list[int]]], device: torch.device) -> _Decode:
    lengths = torch.tensor([len(own) for _, own in decodes], device=device)
    longest = max(len(own) for _, own in decodes)
    # Masked or not, what is read is multiplied: another's NaN, by 0, would be this sequence's.
    padded = [number for _, own in decodes for number in (*own, *own[:1] * (longest - len(own)))]
    distance = lengths.unsqueeze(1) - 1 - torch.arange(longest, device=device)
    rows = torch.tensor([row for row, _ in decodes], device=device)
    return _Decode(rows, torch.tensor(padded, device=device), _Mask(distance))


def _lay_out_prefill(chunk: Chunk, own: list[int], rows: slice, device: torch.device) -> _Prefill:
    queries = torch.arange(chunk.start, chunk.end, device=device)
    distance = queries.unsqueeze(1) - torch.arange(chunk.end, device=device)
    return _Prefill(rows, torch.tensor(own, device=device) if chunk.start else None, _Mask(distance))


class PagedAttention:
    """The attention of one rank's stages over its KV memory. `sites` are its attention calls, in the memory's order."""

    def __init__(
        self,
        sites: Sequence[AttentionSite],
        memory: KVMemory,
        block_size: int,
        rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = rotary,
    ) -> None:
        self._sites = sites
        self.memory = memory
        self._block_size = block_size
        self._rotary = rotary

    def lay_out(self, plan: StepPlan) -> PagedLayout:
        """What every attention site of a step shares."""
        return lay_out(plan, self._block_size, self.memory.device)

    def __call__(
        self,
        step: PagedLayout,
        query: torch.Tensor,  # [1, H, T, D]
        key: torch.Tensor,  # [1, KV, T, D]
        value: torch.Tensor,  # [1, KV, T, E]
        site: int,
        sinks: torch.Tensor | None = None,  # [H]
        cosine: torch.Tensor | None = None,  # broadcasts to the query's shape, as does the sine
        sine: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention call number `site` of a step, whose queries and keys `rotary` turns before → `[1, T, H, E]`."""
        if cosine is not None and sine is not None:
            query, key = self._rotary(query, cosine, sine), self._rotary(key, cosine, sine)
        memory, own = self.memory, self._sites[site]
        queries, new_keys, new_values = query[0], key[0], value[0]
        memory.write(site, step.slots, new_keys.transpose(0, 1), new_values.transpose(0, 1))
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [T, H, E]
        of_head = None if sinks is None else sinks.view(key.shape[1], -1, 1)  # [KV, G, 1]
        if (decode := step.decode) is not None:
            shape = (len(decode.rows), -1, key.shape[1])
            keys = memory.keys[site].index_select(0, decode.slots).view(*shape, key.shape[3]).transpose(1, 2)
            values = memory.values[site].index_select(0, decode.slots).view(*shape, value.shape[3]).transpose(1, 2)
            own_queries = queries[:, decode.rows].transpose(0, 1)
            grouped = own_queries.reshape(len(decode.rows), key.shape[1], -1, key.shape[3])  # [B, KV, G, D]
            is_seen = decode.mask.of(own.window)[:, None, None]  # [B, 1, 1, L]
            output[decode.rows] = _attend(grouped, keys, values, is_seen, own, of_head).flatten(1, 2)
        for prefill in step.prefills:
            keys, values = new_keys[:, prefill.rows], new_values[:, prefill.rows]  # [KV, N, D], [KV, N, E]
            if prefill.slots is not None:
                keys = memory.keys[site].index_select(0, prefill.slots).transpose(0, 1)  # [KV, L, D]
                values = memory.values[site].index_select(0, prefill.slots).transpose(0, 1)
            own_queries = queries[:, prefill.rows]
            grouped = own_queries.reshape(key.shape[1], -1, *own_queries.shape[1:])  # [KV, G, N, D]
            is_seen = prefill.mask.of(own.window)
            sunk = None if of_head is None else of_head.unsqueeze(2)  # [KV, G, 1, 1]
            attended = _attend(grouped, keys.unsqueeze(1), values.unsqueeze(1), is_seen, own, sunk)
            output[prefill.rows] = attended.flatten(0, 1).transpose(0, 1)
        return output.unsqueeze(0)


def _attend(
    query: torch.Tensor,  # [X, Y, Q, D]
    key: torch.Tensor,  # [X, Y or 1, L, D]
    value: torch.Tensor,  # [X, Y or 1, L, E]
    is_seen: torch.Tensor,  # broadcasts to [X, Y, Q, L]
    site: AttentionSite,
    sinks: torch.Tensor | None,  # broadcasts to [X, Y, Q, 1]
) -> torch.Tensor:
    """Softmax attention of each query over the keys that it sees: `[X, Y, Q, E]`.

    A sink is the score of one more key, which has no value: it takes a part of the weights away.
    """
    if site.softcap is None and sinks is None:
        key, value = key.expand(*query.shape[:2], -1, -1), value.expand(*query.shape[:2], -1, -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=is_seen, scale=site.scaling)
    scores = (query @ key.transpose(-1, -2)).float() * site.scaling
    if site.softcap is not None:
        scores = site.softcap * torch.tanh(scores / site.softcap)
    scores = scores.masked_fill(~is_seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[-2]]
    return weights.to(value.dtype) @ value
