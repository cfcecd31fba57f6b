"""Attention by Triton kernels over paged memory: prompts of all sequences in one launch, single tokens in two.

T tokens of the step; H, KV, D, E as in `AttentionSite`. The memory is the kernels' own: within a block, keys and values
lie as `kernels/attention.py` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import next_power_of_2

from ts_parallel.partition.program import AttentionSite
from ts_parallel.runtime.backends.cuda.kernels import attention as kernels
from ts_parallel.runtime.backends.cuda.step_numbers import StepNumbers, StepWriter
from ts_parallel.runtime.backends.kv_memory import KVMemory
from ts_parallel.runtime.backends.torch.norms import rotary
from ts_parallel.step_plan import StepPlan

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run on the CPU, as Triton's interpreter: so they are tested."""

_LEAST = 16  # rows, columns and depth of a product on tensor cores
_ROWS = 64  # of a tile, tokens times heads, where the heads do not make it more
_MOST_HEADS = 8  # of one key/value head, that a tile has
_MOST_SPLITS = 32
_ROUNDS = 2  # programs for each multiprocessor, until a token's keys are split no more


@dataclass(frozen=True)
class _Numbers:
    """What a site's kernels are compiled for."""

    group: int
    tile_heads: int
    decode_heads: int
    num_keys: int
    width: int
    value_width: int


class CudaAttention:
    """The kernels' attention. `sites` are the attention calls, in the memory's order."""

    def __init__(
        self, sites: Sequence[AttentionSite], memory: KVMemory, block_size: int, num_processors: int | None = None
    ) -> None:
        """
        Args:
            num_processors: multiprocessors to be kept busy; None: those of the device.
        """
        self._sites = sites
        self.memory = memory
        self._block_size = block_size
        if num_processors is None and memory.device.type == "cuda":
            num_processors = torch.cuda.get_device_properties(memory.device).multi_processor_count
        self._num_processors = num_processors or 1
        self._numbers = [_numbers_of(site, memory.dtype) for site in sites]
        most_heads = max((numbers.tile_heads for numbers in self._numbers), default=1)
        self._tokens_of_tile = max(_LEAST, _ROWS // most_heads)
        num_blocks = memory.keys[0].shape[0] // block_size if sites else 0
        self._writer = StepWriter(num_blocks, block_size, self._tokens_of_tile, memory.device)
        self._widens = IS_INTERPRETED and memory.dtype == torch.bfloat16

    def lay_out(self, plan: StepPlan) -> StepNumbers:
        """What every attention site of a step shares."""
        return self._writer.write(plan)

    def filling(self, size: int) -> StepNumbers:
        """The layout of a step of `size` without any sequence."""
        return self._writer.filling(size)

    def __call__(
        self,
        step: StepNumbers,
        query: torch.Tensor,  # [1, H, T, D]
        key: torch.Tensor,  # [1, KV, T, D]
        value: torch.Tensor,  # [1, KV, T, E]
        site: int,
        sinks: torch.Tensor | None = None,  # [H]
        cosine: torch.Tensor | None = None,  # broadcasts to the query's shape, as does the sine
        sine: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention call number `site` of a step, whose queries and keys `rotary` turns before → `[1, T, H, E]`."""
        if cosine is not None and sine is not None and not _are_for_kernels(query, key, cosine, sine):
            query, key, cosine, sine = rotary(query, cosine, sine), rotary(key, cosine, sine), None, None
        query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
        query = self._write(step, query, key, value, site, cosine, sine)
        output = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
        if step.tiles.numel():
            self._attend_tiles(step, query, output, site, sinks)
        if step.decodes.numel():
            self._attend_decodes(step, query, output, site, sinks)
        return output

    def _write(
        self,
        step: StepNumbers,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: int,
        cosine: torch.Tensor | None,
        sine: torch.Tensor | None,
    ) -> torch.Tensor:
        """Keys and values into memory; the queries, turned if there are angles."""
        own, numbers = self._sites[site], self._numbers[site]
        num_heads, num_tokens = query.shape[1:3]
        turned, num_turned, angle_token = query, 0, 0
        if cosine is not None and sine is not None:
            turned = query.new_empty((1, num_tokens, num_heads, own.head_dim)).transpose(1, 2)
            num_turned, angle_token = num_heads, cosine.stride(2)
        kernels.turn_and_write[num_tokens, own.num_kv_heads + num_turned](
            query, key, value, query if cosine is None else cosine, query if sine is None else sine, turned,
            self.memory.keys[site], self.memory.values[site], step.slots,
            query.stride(2), query.stride(1), key.stride(2), key.stride(1), value.stride(2), value.stride(1),
            angle_token, num_heads, own.num_kv_heads,
            BLOCK_SIZE=self._block_size, DIM=own.head_dim, WIDTH=numbers.width,
            VALUE_DIM=own.value_dim, VALUE_WIDTH=numbers.value_width, TURNS=num_turned > 0, num_warps=1,
        )  # fmt: skip
        return turned

    def _attend_tiles(
        self, step: StepNumbers, query: torch.Tensor, output: torch.Tensor, site: int, sinks: torch.Tensor | None
    ) -> None:
        own, numbers = self._sites[site], self._numbers[site]
        head_tiles = -(-numbers.group // numbers.tile_heads)
        kernels.attend_tiles[step.tiles.numel() // 2, own.num_kv_heads, head_tiles](
            query, output, self.memory.keys[site], self.memory.values[site], query if sinks is None else sinks,
            step.chunks, step.tiles, step.block_ids, query.stride(2), query.stride(1), own.num_kv_heads,
            own.scaling, own.softcap or 1.0,
            HEADS=numbers.tile_heads, TOKENS=self._tokens_of_tile, HAS_SINKS=sinks is not None, **self._shared(site),
        )  # fmt: skip

    def _attend_decodes(
        self, step: StepNumbers, query: torch.Tensor, output: torch.Tensor, site: int, sinks: torch.Tensor | None
    ) -> None:
        own, numbers, num_decodes = self._sites[site], self._numbers[site], step.decodes.numel()
        num_programs = own.num_kv_heads * -(-numbers.group // numbers.decode_heads)
        splits = self._num_splits(num_decodes * num_programs)
        num_heads = query.shape[1]
        sums = query.new_empty((splits, num_decodes, num_heads, own.value_dim), dtype=torch.float32)
        weights = query.new_empty((2, splits, num_decodes, num_heads), dtype=torch.float32)
        kernels.attend_splits[num_decodes, num_programs, splits](
            query, sums, weights, self.memory.keys[site], self.memory.values[site],
            step.chunks, step.decodes, step.block_ids, query.stride(2), query.stride(1), own.num_kv_heads,
            own.scaling, own.softcap or 1.0,
            HEADS=numbers.decode_heads, SPLITS=splits, **self._shared(site),
        )  # fmt: skip
        kernels.join_splits[num_decodes, num_heads](
            sums, weights, output, query if sinks is None else sinks, step.chunks, step.decodes,
            SPLITS=splits, VALUE_DIM=own.value_dim, VALUE_WIDTH=numbers.value_width, HAS_SINKS=sinks is not None,
            num_warps=1 if numbers.value_width <= 64 else 2,
        )  # fmt: skip

    def _num_splits(self, num_programs: int) -> int:
        """How many parts each sequence's keys are cut into: by how many programs there are, never by their lengths, so
        that a step that was recorded is right for all."""
        wanted = _ROUNDS * self._num_processors // num_programs
        return min(_MOST_SPLITS, 1 << max(0, wanted.bit_length() - 1))

    def _shared(self, site: int) -> dict[str, Any]:
        own, numbers = self._sites[site], self._numbers[site]
        return {
            "GROUP": numbers.group,
            "NUM_KEYS": numbers.num_keys,
            "BLOCK_SIZE": self._block_size,
            "DIM": own.head_dim,
            "WIDTH": numbers.width,
            "VALUE_DIM": own.value_dim,
            "VALUE_WIDTH": numbers.value_width,
            "WINDOW": own.window or 0,
            "HAS_SOFTCAP": own.softcap is not None,
            "WIDENS": self._widens,
            "num_warps": 8 if self.memory.dtype == torch.float32 else 4,
            "num_stages": 2,
        }


def _numbers_of(site: AttentionSite, dtype: torch.dtype) -> _Numbers:
    group = site.num_heads // site.num_kv_heads
    width, value_width = (max(_LEAST, next_power_of_2(dim)) for dim in (site.head_dim, site.value_dim))
    num_keys = 64 if max(width, value_width) * dtype.itemsize <= 256 else 32
    if max(width, value_width) > 256:
        num_keys = _LEAST
    decode_heads = min(64, max(_LEAST, next_power_of_2(group)))
    return _Numbers(group, min(_MOST_HEADS, next_power_of_2(group)), decode_heads, num_keys, width, value_width)


def _are_for_kernels(query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> bool:
    """Whether the kernels turn queries and keys by these."""
    shape = (1, 1, query.shape[2], query.shape[3])
    return (
        cosine.shape == sine.shape == shape
        and cosine.dtype == sine.dtype == query.dtype == key.dtype
        and cosine.stride() == sine.stride()
        and cosine.stride(3) == 1
        and query.shape[3] % 2 == 0
    )
