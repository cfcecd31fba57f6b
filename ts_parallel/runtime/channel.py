"""Rank 0's step plans on their way to the ranks that follow: numbers, over the CPU, in order."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from ts_parallel.runtime.step import StepPlan

# The first message has room for most plans; only a longer one needs a second.
FIRST_MESSAGE = 1024
# A rank that hears nothing from rank 0 for so long takes it for dead; the engine gives signs of life well within it.
PATIENCE = timedelta(seconds=120)


class StepChannel:
    """One sender, rank 0, and all others receiving. Does nothing where there is one rank."""

    def __init__(self, world_size: int) -> None:
        self._is_alone = world_size == 1
        self._group = None if self._is_alone else dist.new_group(backend="gloo", timeout=PATIENCE)

    def send(self, plan: StepPlan) -> None:
        if self._is_alone:
            return
        numbers = plan.encode()
        first = torch.zeros(FIRST_MESSAGE, dtype=torch.int64)
        first[0] = len(numbers)
        fitting = min(len(numbers), FIRST_MESSAGE - 1)
        first[1 : 1 + fitting] = numbers[:fitting]
        dist.broadcast(first, 0, group=self._group)
        if fitting < len(numbers):
            dist.broadcast(numbers[fitting:].clone(), 0, group=self._group)

    def receive(self) -> StepPlan:
        first = torch.empty(FIRST_MESSAGE, dtype=torch.int64)
        dist.broadcast(first, 0, group=self._group)
        length = int(first[0])
        numbers = first[1 : 1 + length].tolist()
        if len(numbers) < length:
            rest = torch.empty(length - len(numbers), dtype=torch.int64)
            dist.broadcast(rest, 0, group=self._group)
            numbers += rest.tolist()
        return StepPlan.decode(numbers)
