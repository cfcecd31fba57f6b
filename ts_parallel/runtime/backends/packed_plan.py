"""A step plan as what every attention wants of it: the packed tokens, and block tables one behind the other.

T tokens of the step, R rows whose logits are wanted. The chunks cost a loop, their blocks a copy of memory.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch

from ts_parallel.step_plan import StepPlan

NUMBERS_A_CHUNK = 4


@dataclass(frozen=True)
class PackedPlan:
    """Tensors on the CPU, and int64 numbers as memory."""

    token_ids: torch.Tensor  # [1, T]
    positions: torch.Tensor  # [1, T]
    sampled_rows: torch.Tensor  # [R], the tokens whose logits are wanted
    chunks: array[int]
    """Four numbers each: the first of its tokens among the step's, their count, the position of the first, and where
    its blocks begin among `block_ids`."""
    block_ids: array[int]


def pack(plan: StepPlan) -> PackedPlan:
    """The chunks' tokens one after another; of each, the rows before `next_ids`, then the sampled one."""
    token_ids, positions, sampled = array("q"), array("q"), array("q")
    chunks, block_ids = array("q"), array("q")
    for chunk in plan.chunks:
        first = len(token_ids)
        chunks.extend((first, len(chunk.token_ids), chunk.start, len(block_ids)))
        block_ids.extend(chunk.block_ids)
        token_ids.extend(chunk.token_ids)
        positions.extend(range(chunk.start, chunk.end))
        sampled.extend(range(first, first + len(chunk.next_ids)))
        if chunk.is_sampled:
            sampled.append(len(token_ids) - 1)
    return PackedPlan(
        as_tensor(token_ids).unsqueeze(0), as_tensor(positions).unsqueeze(0), as_tensor(sampled), chunks, block_ids
    )


def as_tensor(numbers: array[int]) -> torch.Tensor:
    """int64 `[N]` in the memory of `numbers`, whose length may not change any more."""
    return torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)
