"""The package's kernels as a backend: bfloat16 and float16 on CPUs that have what they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ts_parallel.native import kernels_for
from ts_parallel.native.packed_weight import PANEL, PackedWeight, can_pack
from ts_parallel.partition.load import WeightLayout
from ts_parallel.partition.program import (
    AttentionSite,
    AttentionSublayer,
    GatedSublayer,
    Linears,
    RankProgram,
    RmsNorm,
    SublayerStack,
    Weight,
    linears_of,
)
from ts_parallel.runtime.backends.base import Attention, Sublayer, Tensors
from ts_parallel.runtime.backends.kv_memory import KVMemory
from ts_parallel.runtime.backends.native import linears, norms, sampling, sublayers
from ts_parallel.runtime.backends.native.attention import KernelAttention
from ts_parallel.runtime.backends.torch import sampling as plain
from ts_parallel.runtime.backends.torch.backend import TorchBackend
from ts_parallel.step_plan import Chunk
from ts_parallel.topology import TensorParallelGroup


class _Panels:
    """Weights of linears in panels of rows (`native.packed_weight`)."""

    rows_of_panel = PANEL

    def takes(self, weight: torch.Tensor) -> bool:
        return can_pack(weight)

    def allocate(
        self, shape: tuple[int, int], dtype: torch.dtype, quantization: str | None, group: int | None = None
    ) -> PackedWeight:
        return PackedWeight.allocate(shape, quantization, dtype, group)


class NativeBackend(TorchBackend):
    """Kernels where they fit, torch's functions elsewhere: other dtypes, odd block sizes and widths, mixed weights."""

    name = "native"
    quantizations = frozenset({"int8", "int4"})
    weights: WeightLayout | None = _Panels()

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
        are_pairs = block_size % 2 == 0 and all(site.head_dim % 2 == 0 for site in sites)  # which the kernels multiply
        if kernels_for(dtype) is None or not are_pairs:
            return super().make_attention(sites, num_blocks, block_size, dtype, device)
        return KernelAttention(sites, KVMemory(sites, num_blocks, block_size, dtype, device), block_size)

    def make_gated_sublayer(self, entry: GatedSublayer, tensors: Tensors) -> Sublayer:
        return sublayers.make_gated_sublayer(entry, tensors)

    def make_attention_sublayer(self, entry: AttentionSublayer, tensors: Tensors, attention: Any) -> Sublayer:
        return sublayers.make_attention_sublayer(entry, tensors, attention)

    def make_stack(
        self, entry: SublayerStack, tensors: Tensors, attention: Any, group: TensorParallelGroup
    ) -> Sublayer:
        return sublayers.make_stack(entry, tensors, attention, group, self.sums(group))

    def choose(self, logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
        return plain.choose(logits, chunks, sampling.sample)

    def set_num_threads(self, number: int) -> None:
        for dtype in (torch.bfloat16, torch.float16):  # a model may have weights of both
            if kernels := kernels_for(dtype):
                kernels.set_num_threads(number)

    def settle(self, program: RankProgram, tensors: Tensors) -> None:
        if _are_all_products_in_kernels(program, tensors):
            # What torch itself still computes is small; a team of its own threads would spin on the kernels' cores.
            torch.set_num_threads(1)


def _are_all_products_in_kernels(program: RankProgram, tensors: Tensors) -> bool:
    """Whether the kernels, which have threads of their own, multiply all matrices of a step."""
    calls = [call for stage in program.stages for call in stage.globals.values()]
    names = {layer.weight for call in calls for layer in linears_of(call)}
    others = {call.name for call in calls if isinstance(call, Weight)} - set(program.buffers)
    are_packed = bool(names) and all(isinstance(tensors[name], PackedWeight) for name in names)
    return are_packed and all(tensors[name].ndim < 3 for name in others)  # where experts are, a stack of matrices
