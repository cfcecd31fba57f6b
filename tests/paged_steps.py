"""Step plans of sequences that grow by so many tokens each step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from ts_parallel.step_plan import Chunk, StepPlan


def plans_of(schedule: Sequence[Mapping[str, int]], num_blocks: int, block_size: int) -> list[StepPlan]:
    """The steps over blocks that are given out in no order, as the sequences grow."""
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    lengths, blocks = defaultdict[str, int](int), defaultdict[str, list[int]](list)
    made = []
    for step in schedule:
        chunks = []
        for name, num_tokens in step.items():
            start, end = lengths[name], lengths[name] + num_tokens
            while len(blocks[name]) * block_size < end:
                blocks[name].append(free.pop())
            chunks.append(Chunk(name, tuple(range(start, end)), start, tuple(blocks[name]), is_sampled=True))
            lengths[name] = end
        made.append(StepPlan(tuple(chunks)))
    return made
