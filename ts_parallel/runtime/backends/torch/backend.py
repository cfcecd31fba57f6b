"""torch's own functions as a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ts_parallel.partition.program import (
    AttentionSite,
    AttentionSublayer,
    GatedSublayer,
    Linears,
    RmsNorm,
    SublayerStack,
)
from ts_parallel.runtime.backends.base import Attention, Backend, Sublayer, Tensors
from ts_parallel.runtime.backends.kv_memory import KVMemory
from ts_parallel.runtime.backends.torch import linears, norms, sampling, sublayers
from ts_parallel.runtime.backends.torch.paged_attention import PagedAttention
from ts_parallel.step_plan import Chunk
from ts_parallel.topology import TensorParallelGroup


class TorchBackend(Backend):
    """Works on any device and in any dtype. What a sublayer is made of is made by `self`, whichever backend that is."""

    name = "torch"

    def make_norm(self, entry: RmsNorm, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return norms.make_norm(entry, weight)

    def make_linears(self, entry: Linears, tensors: Tensors) -> Callable[..., Any]:
        return linears.make_linears(entry, tensors)

    def make_embedding(self, weight: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return linears.make_embedding(weight)

    def rotary(self, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        return norms.rotary(hidden, cosine, sine)

    def make_attention(
        self,
        sites: Sequence[AttentionSite],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Attention:
        return PagedAttention(sites, KVMemory(sites, num_blocks, block_size, dtype, device), block_size, self.rotary)

    def make_gated_sublayer(self, entry: GatedSublayer, tensors: Tensors) -> Sublayer:
        norm = self.make_norm(entry.norm, tensors[entry.norm.weight])
        return sublayers.gated_sublayer(
            norm, self.make_linears(entry.gated, tensors), self.make_linears(entry.last, tensors)
        )

    def make_attention_sublayer(self, entry: AttentionSublayer, tensors: Tensors, attention: Any) -> Sublayer:
        norm = self.make_norm(entry.norm, tensors[entry.norm.weight])
        first, last = self.make_linears(entry.linears, tensors), self.make_linears(entry.last, tensors)
        return sublayers.attention_sublayer(entry, norm, first, last, attention)

    def make_stack(
        self, entry: SublayerStack, tensors: Tensors, attention: Any, group: TensorParallelGroup
    ) -> Sublayer:
        parts: list[tuple[bool, Sublayer]] = []
        for part in entry.sublayers:
            if isinstance(part, AttentionSublayer):
                parts.append((True, self.make_attention_sublayer(part, tensors, attention)))
            else:
                parts.append((False, self.make_gated_sublayer(part, tensors)))
        return sublayers.stack(parts, self.sums(group) if entry.are_parts else None)

    def choose(self, logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
        return sampling.choose(logits, chunks)
