"""Run by torchrun: rank 0 sends plans, the others check that each arrives as it was sent."""

from __future__ import annotations

import torch.distributed as dist

from ts_parallel.runtime.channel import FIRST_MESSAGE, StepChannel
from ts_parallel.runtime.step import Chunk, StepPlan


def plan_of(num_numbers: int, first: int) -> StepPlan:
    """A plan of so many numbers: its flag, a chunk's head of four, and token ids counted from `first`."""
    num_tokens = num_numbers - 5 - 2
    plan = StepPlan((Chunk("", tuple(range(first, first + num_tokens)), 3, (9, 8), is_sampled=True),))
    assert len(plan.encode()) == num_numbers
    return plan


PLANS = [
    plan_of(12, 0),
    StepPlan(),
    plan_of(FIRST_MESSAGE - 1, 100),  # the longest that fits in one message
    plan_of(FIRST_MESSAGE, 200),
    plan_of(20, 300),  # nothing of the longer one before is left in it
    plan_of(5 * FIRST_MESSAGE, 400),
    StepPlan(is_last=True),
]


def main() -> None:
    dist.init_process_group("gloo")
    channel = StepChannel(dist.get_world_size())
    if dist.get_rank() == 0:
        for plan in PLANS:
            channel.send(plan)
    else:
        received = [channel.receive() for _ in PLANS]
        assert received == PLANS, received
        print(f"rank {dist.get_rank()} received {len(received)} plans", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
