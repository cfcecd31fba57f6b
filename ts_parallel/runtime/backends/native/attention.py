"""Attention that reads keys and values where they lie in paged memory, in bfloat16 or float16.

T tokens of the step; H, KV, D, E as in `AttentionSite`. torch's backend does the same with functions that want keys and
values side by side, so that each step copies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ts_parallel.native import kernels_for
from ts_parallel.partition.program import AttentionSite
from ts_parallel.runtime.backends.kv_memory import KVMemory
from ts_parallel.runtime.backends.native.norms import is_turned_by_kernels, rotary
from ts_parallel.runtime.backends.packed_plan import pack
from ts_parallel.step_plan import StepPlan


@dataclass(frozen=True)
class KernelLayout:
    """A step plan as tensors, and as the kernels read it."""

    token_ids: torch.Tensor  # [1, T]
    positions: torch.Tensor  # [1, T]
    sampled_rows: torch.Tensor  # [R], the tokens whose logits are wanted
    step: Any  # where each chunk's tokens and blocks are


class KernelAttention:
    """The kernels' attention. `sites` are the attention calls, in the memory's order.

    The memory is the kernels' own: within a block, keys and values lie as `native/operations/attention.h` has them.
    """

    def __init__(self, sites: Sequence[AttentionSite], memory: KVMemory, block_size: int) -> None:
        self._sites = sites
        self.memory, self.dtype = memory, memory.dtype
        kernels = kernels_for(memory.dtype)
        assert kernels is not None, "the backend has asked"
        self._kernels = kernels
        self._block_size = block_size
        self._made: dict[tuple[int, int], Any] = {}  # the kernels' own description of a site with its sinks

    def lay_out(self, plan: StepPlan) -> KernelLayout:
        """What every attention site of a step shares."""
        packed = pack(plan)
        chunks, block_ids = packed.chunks.tobytes(), packed.block_ids.tobytes()
        return KernelLayout(
            token_ids=packed.token_ids,
            positions=packed.positions,
            sampled_rows=packed.sampled_rows,
            step=self._kernels.make_step(self._block_size, packed.token_ids.numel(), chunks, block_ids),
        )

    def __call__(
        self,
        layout: KernelLayout,
        query: torch.Tensor,  # [1, H, T, D]
        key: torch.Tensor,  # [1, KV, T, D]
        value: torch.Tensor,  # [1, KV, T, E]
        site: int,
        sinks: torch.Tensor | None = None,  # [H]
        cosine: torch.Tensor | None = None,  # [1, 1, T, D]
        sine: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention call number `site` of a step, whose queries and keys `rotary` turns before → `[1, T, H, E]`."""
        turns = (0, 0)
        if cosine is not None and sine is not None:
            if is_turned_by_kernels(query, cosine, sine):
                turns = (cosine.data_ptr(), sine.data_ptr())
            else:
                query, key = rotary(query, cosine, sine), rotary(key, cosine, sine)
        output = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
        places: list[int] = []
        # What is copied here must live until the kernel has read it.
        laid_out = [heads if heads.stride(3) == 1 else heads.contiguous() for heads in (query, key, value)]
        for heads in laid_out:
            _, head_stride, token_stride, _ = heads.stride()
            places += (heads.data_ptr(), head_stride, token_stride)
        _, token_stride, head_stride, _ = output.stride()
        self._kernels.attention(
            self.site(site, sinks), layout.step, *turns, *places, output.data_ptr(), head_stride, token_stride
        )
        return output

    def site(self, number: int, sinks: torch.Tensor | None = None) -> Any:
        """The kernels' own description of attention call `number`."""
        place = 0 if sinks is None else sinks.data_ptr()
        made = self._made.get((number, place))
        if made is None:
            assert sinks is None or (sinks.dtype == self.dtype and sinks.is_contiguous())
            own = self._sites[number]
            made = self._made[number, place] = self._kernels.make_site(
                own.num_heads,
                own.num_kv_heads,
                own.head_dim,
                own.value_dim,
                own.window or 0,
                self.memory.keys[number].data_ptr(),
                self.memory.values[number].data_ptr(),
                place,
                own.scaling,
                own.softcap or 0.0,
            )
        return made
