"""Attention over paged KV memory, for the packed tokens of one step.

T tokens of the step, B decoding sequences, N new tokens of one sequence, L its length, G query heads of a key/value
head; H, KV, D, E as in `AttentionSite`. Sequences that add one token run together, padded to the longest; the others
one by one. PagedAttention: Kwon et al. 2023 (https://arxiv.org/abs/2309.06180).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ts_parallel.partition.attention_sites import AttentionPattern
from ts_parallel.runtime.kv_memory import KVMemory
from ts_parallel.runtime.step import Chunk, StepPlan


@dataclass(frozen=True)
class _Decode:
    """All sequences that add one token."""

    rows: torch.Tensor  # [B], their tokens among the step's
    slots: torch.Tensor  # [B × longest], the slots they read; padding reads slot 0
    distance: torch.Tensor  # [B, longest], how far behind the new token; negative where padded


@dataclass(frozen=True)
class _Prefill:
    """One sequence that adds several tokens."""

    rows: slice  # its tokens among the step's
    slots: torch.Tensor | None  # [L], None where all its tokens are new
    distance: torch.Tensor  # [N, L], how far each key lies behind each query; negative ahead of it


@dataclass(frozen=True)
class StepLayout:
    """A step plan as tensors."""

    token_ids: torch.Tensor  # [1, T]
    positions: torch.Tensor  # [1, T]
    sampled_rows: torch.Tensor  # [R], the tokens whose logits are wanted
    slots: torch.Tensor  # [T], where each token's key and value are written
    decode: _Decode | None
    prefills: tuple[_Prefill, ...]


def lay_out(plan: StepPlan, block_size: int, device: torch.device) -> StepLayout:
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
        if chunk.is_sampled:
            sampled.append(len(token_ids) - 1)
        if len(chunk.token_ids) == 1:
            decodes.append((first, own))
        else:
            prefills.append(_lay_out_prefill(chunk, own, slice(first, len(token_ids)), device))

    def tensor(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    return StepLayout(
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
    padded = [number for _, own in decodes for number in (*own, *[0] * (longest - len(own)))]
    distance = lengths.unsqueeze(1) - 1 - torch.arange(longest, device=device)
    rows = torch.tensor([row for row, _ in decodes], device=device)
    return _Decode(rows, torch.tensor(padded, device=device), distance)


def _lay_out_prefill(chunk: Chunk, own: list[int], rows: slice, device: torch.device) -> _Prefill:
    queries = torch.arange(chunk.start, chunk.end, device=device)
    distance = queries.unsqueeze(1) - torch.arange(chunk.end, device=device)
    return _Prefill(rows, torch.tensor(own, device=device) if chunk.start else None, distance)


class PagedAttention:
    """The attention backend of one rank. Owns the KV memory and, during a step, the step's layout and call count."""

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory
        self._layout: StepLayout | None = None
        self._site = 0

    def begin(self, layout: StepLayout) -> None:
        """Start a step: the next attention call is the first site's."""
        self._layout, self._site = layout, 0

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pattern: AttentionPattern,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        assert self._layout is not None
        layout, site, memory = self._layout, self._site, self._memory
        self._site += 1
        queries, new_keys, new_values = query[0], key[0], value[0]  # [H, T, D], [KV, T, D], [KV, T, E]
        memory.write(site, layout.slots, new_keys.transpose(0, 1), new_values.transpose(0, 1))
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [T, H, E]
        rest = (pattern.window, scaling, softcap, sinks)
        if layout.decode is not None:
            rows, slots = layout.decode.rows, layout.decode.slots
            shape = (len(rows), -1, key.shape[1])
            keys = memory.keys[site].index_select(0, slots).view(*shape, key.shape[3]).transpose(1, 2)
            values = memory.values[site].index_select(0, slots).view(*shape, value.shape[3]).transpose(1, 2)
            grouped = (
                queries[:, rows].transpose(0, 1).reshape(len(rows), key.shape[1], -1, key.shape[3])
            )  # [B, KV, G, D]
            mask = layout.decode.distance[:, None, None]  # [B, 1, 1, L]
            attended = _attend(grouped, keys, values, mask, *rest)  # [B, KV, G, E]
            output[rows] = attended.flatten(1, 2)
        for prefill in layout.prefills:
            own = queries[:, prefill.rows]
            keys, values = new_keys[:, prefill.rows], new_values[:, prefill.rows]  # [KV, N, D], [KV, N, E]
            if prefill.slots is not None:
                keys = memory.keys[site].index_select(0, prefill.slots).transpose(0, 1)  # [KV, L, D]
                values = memory.values[site].index_select(0, prefill.slots).transpose(0, 1)
            grouped = own.reshape(key.shape[1], -1, *own.shape[1:])  # [KV, G, N, D]
            attended = _attend(grouped, keys.unsqueeze(1), values.unsqueeze(1), prefill.distance, *rest)
            output[prefill.rows] = attended.flatten(0, 1).transpose(0, 1)
        return output.unsqueeze(0)


def _attend(
    query: torch.Tensor,  # [X, Y, Q, D]
    key: torch.Tensor,  # [X, Y or 1, L, D]
    value: torch.Tensor,  # [X, Y or 1, L, E]
    distance: torch.Tensor,  # broadcasts to [X, Y, Q, L]
    window: int | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention of each query over the keys less than `window` behind it: `[X, Y, Q, E]`."""
    is_seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if softcap is None and sinks is None:
        key, value = key.expand(*query.shape[:2], -1, -1), value.expand(*query.shape[:2], -1, -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=is_seen, scale=scaling)
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~is_seen, float("-inf"))
    assert sinks is None, "attention sinks are refused when the runner is built"
    return scores.softmax(dim=-1).to(value.dtype) @ value
