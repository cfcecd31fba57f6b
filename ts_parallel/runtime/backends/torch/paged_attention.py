"""Attention over paged KV memory, for the packed tokens of one step.

T tokens of the step, B decoding sequences, N new tokens of one sequence, L its length, G query heads of a key/value
head; H, KV, D, E as in `AttentionSite`. Sequences that add one token run together, padded to the longest; the others
one by one. PagedAttention: Kwon et al. 2023 (https://arxiv.org/abs/2309.06180).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ts_parallel.partition.program import AttentionSite
from ts_parallel.runtime.backends.kv_memory import KVMemory
from ts_parallel.runtime.backends.packed_plan import NUMBERS_A_CHUNK, as_tensor, pack
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
    slots: torch.Tensor  # [B × longest], the slots they read; padding reads the sequence's own last one again
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


class _BlockTables:
    """All chunks' blocks on the device, one behind the other. Tells slots of positions."""

    def __init__(self, block_ids: torch.Tensor, block_size: int) -> None:
        self._block_ids = block_ids
        self._block_size = block_size

    def slots(self, first_blocks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Of tokens at `positions` of sequences whose blocks begin at `first_blocks`, both `[N]` → `[N]`."""
        blocks = self._block_ids[first_blocks + positions // self._block_size]
        return blocks * self._block_size + positions % self._block_size

    def first_slots(self, first_blocks: torch.Tensor, last: torch.Tensor, longest: int) -> torch.Tensor:
        """Of the first `longest` tokens of sequences whose last ones are at `last` `[B]` → `[B, longest]`; where a
        sequence has no more blocks, its last one comes again."""
        numbers = torch.arange(-(-longest // self._block_size), device=last.device)
        own = torch.minimum(numbers, (last // self._block_size).unsqueeze(1))
        blocks = self._block_ids[first_blocks.unsqueeze(1) + own]
        offsets = torch.arange(self._block_size, device=last.device)
        return (blocks.unsqueeze(2) * self._block_size + offsets).flatten(1)[:, :longest]


def lay_out(plan: StepPlan, block_size: int, device: torch.device) -> PagedLayout:
    """The tensors that every attention site of a step shares."""
    packed = pack(plan)
    chunks, positions = as_tensor(packed.chunks).view(-1, NUMBERS_A_CHUNK).to(device), packed.positions.to(device)
    tables = _BlockTables(as_tensor(packed.block_ids).to(device), block_size)
    decodes, prefills = array("q"), list[_Prefill]()  # chunks by number
    for number, chunk in enumerate(plan.chunks):
        if len(chunk.token_ids) == 1:
            decodes.append(number)
        else:
            row, first_block = packed.chunks[NUMBERS_A_CHUNK * number], chunks[number, 3:]
            rows = slice(row, row + len(chunk.token_ids))
            prefills.append(_lay_out_prefill(chunk, rows, first_block, tables, device))
    own = chunks[as_tensor(decodes).to(device)] if prefills else chunks
    _, counts, _, first_blocks = chunks.unbind(1)
    return PagedLayout(
        token_ids=packed.token_ids.to(device),
        positions=positions,
        sampled_rows=packed.sampled_rows.to(device),
        slots=tables.slots(first_blocks.repeat_interleave(counts, output_size=positions.numel()), positions[0]),
        decode=_lay_out_decodes([plan.chunks[number] for number in decodes], own, tables) if decodes else None,
        prefills=tuple(prefills),
    )


def _lay_out_decodes(decodes: Sequence[Chunk], chunks: torch.Tensor, tables: _BlockTables) -> _Decode:
    """`chunks` `[B, 4]` are those of `decodes`, as `PackedPlan` has them."""
    rows, _, last, first_blocks = chunks.unbind(1)
    ends = [chunk.end for chunk in decodes]
    longest = max(ends)
    distance = last.unsqueeze(1) - torch.arange(longest, device=chunks.device)
    slots = tables.first_slots(first_blocks, last, longest)
    if min(ends) < longest:
        # What lies behind a sequence in its last block is of earlier ones: 0 × NaN would be NaN there too.
        slots = torch.where(distance >= 0, slots, slots.gather(1, last.unsqueeze(1)))
    return _Decode(rows, slots.flatten(), _Mask(distance))


def _lay_out_prefill(
    chunk: Chunk, rows: slice, first_block: torch.Tensor, tables: _BlockTables, device: torch.device
) -> _Prefill:
    keys = torch.arange(chunk.end, device=device)
    mask = _Mask(keys[chunk.start :].unsqueeze(1) - keys)
    return _Prefill(rows, tables.slots(first_block, keys) if chunk.start else None, mask)


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
