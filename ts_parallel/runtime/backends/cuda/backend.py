"""Triton's kernels and the GEMMs of torch as a backend: float32, bfloat16 and float16 on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ts_parallel.partition.program import (
    AttentionSite,
    AttentionSublayer,
    Linears,
    RmsNorm,
    SublayerStack,
)
from ts_parallel.runtime.backends.base import Attention, StepFunction, Sublayer, Tensors
from ts_parallel.runtime.backends.cuda import linears, norms, sampling, sublayers
from ts_parallel.runtime.backends.cuda.attention import CudaAttention
from ts_parallel.runtime.backends.cuda.recorded_steps import GraphRecorder, RecordedSteps, Recorder
from ts_parallel.runtime.backends.cuda.step_numbers import STEP_SIZES
from ts_parallel.runtime.backends.kv_memory import KVMemory
from ts_parallel.runtime.backends.torch import sampling as plain
from ts_parallel.runtime.backends.torch.backend import TorchBackend
from ts_parallel.step_plan import Chunk
from ts_parallel.topology import TensorParallelGroup


class CudaBackend(TorchBackend):
    """Few launches a layer, no answer asked of the GPU before a step's tokens."""

    name = "cuda"

    def __init__(self, recorded_sizes: Sequence[int] = STEP_SIZES, recorder: Recorder | None = None) -> None:
        """
        Args:
            recorded_sizes: of how many sequences the steps are that are recorded; none: each operation is launched.
            recorder: None: CUDA graphs on a GPU, and elsewhere nothing is recorded.
        """
        self._recorded_sizes = recorded_sizes
        self._recorder = recorder

    def make_norm(self, entry: RmsNorm, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return norms.make_norm(entry, weight)

    def make_linears(self, entry: Linears, tensors: Tensors) -> Callable[..., Any]:
        return linears.make_linears(entry, tensors)

    def make_attention(
        self,
        sites: Sequence[AttentionSite],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Attention:
        return CudaAttention(sites, KVMemory(sites, num_blocks, block_size, dtype, device), block_size)

    def prepare_steps(self, stage: StepFunction, attention: Attention, *, is_sent_on: bool) -> StepFunction:
        assert isinstance(attention, CudaAttention)
        recorder, device = self._recorder, attention.memory.device
        if recorder is None and device.type == "cuda" and self._recorded_sizes:
            recorder = GraphRecorder(device)
        if recorder is None:
            return stage
        return RecordedSteps(stage, attention, recorder, self._recorded_sizes, is_sent_on=is_sent_on)

    def choose(self, logits: torch.Tensor, chunks: Sequence[Chunk]) -> list[int]:
        return plain.choose(logits, chunks, sampling.sample)

    def make_stack(
        self, entry: SublayerStack, tensors: Tensors, attention: Any, group: TensorParallelGroup
    ) -> Sublayer:
        parts = []
        for part in entry.sublayers:
            add_norm = norms.make_add_norm(part.norm, tensors[part.norm.weight])
            last = self.make_linears(part.last, tensors)
            if isinstance(part, AttentionSublayer):
                first = self.make_linears(part.linears, tensors)
                parts.append((add_norm, sublayers.attention_inner(part, first, last, attention)))
            else:
                parts.append((add_norm, sublayers.gated_inner(self.make_linears(part.gated, tensors), last)))
        return sublayers.stack(parts, self.sums(group) if entry.are_parts else None)
