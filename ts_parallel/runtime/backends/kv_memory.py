"""The buffers of keys and values: for every attention site one of blocks, each of `block_size` token slots.

Which block belongs to whom is the block manager's business, and how the numbers of a block lie the attention's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ts_parallel.partition.program import AttentionSite


class KVMemory:
    """Owns the key and value buffers of one rank: `keys[site]` is `[S, KV, D]`, `values[site]` is `[S, KV, E]`.

    So `PagedAttention` has it; `KernelAttention` lays out the same bytes as `native/operations/attention.h` says, and
    `CudaAttention` as `cuda/kernels/attention.py` does.
    """

    def __init__(
        self, sites: Sequence[AttentionSite], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.device, self.dtype = device, dtype
        num_slots = num_blocks * block_size
        # Nobody reads a slot before it is written. Zeros take no memory until then, which garbage might.
        self.keys = [
            torch.zeros(num_slots, site.num_kv_heads, site.head_dim, dtype=dtype, device=device) for site in sites
        ]
        self.values = [
            torch.zeros(num_slots, site.num_kv_heads, site.value_dim, dtype=dtype, device=device) for site in sites
        ]

    def write(self, site: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `key` `[T, KV, D]` and `value` `[T, KV, E]` in `slots` `[T]`."""
        self.keys[site].index_copy_(0, slots, key)
        self.values[site].index_copy_(0, slots, value)
