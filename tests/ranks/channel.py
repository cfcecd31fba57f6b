"""Run by torchrun: `channel.py NUM_STAGES TENSOR_PARALLEL_SIZE shared|gloo`.

Each rank checks that it hears what the others say.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ts_parallel import shared_memory
from ts_parallel.runtime.channel import FIRST_MESSAGE, StepChannel
from ts_parallel.runtime.plan_codec import PlanEncoder
from ts_parallel.step_plan import Chunk, SamplingParams, StepPlan
from ts_parallel.topology import Topology, open_topology

LARGE = 3_000_000  # numbers, which no socket takes at once


def plan_of(num_numbers: int, first: int) -> StepPlan:
    """A plan of so many numbers: its head, a chunk's, token ids counted from `first`, blocks, sampling, a mask."""
    num_tokens = num_numbers - 3 - 10 - 2 - 10 - 1
    sampling, token_ids = SamplingParams(0.7, 0.9, 2**64 - 1), tuple(range(first, first + num_tokens))
    chunk = Chunk(str(first), token_ids, 3, array("q", (9, 8)), True, sampling, allowed=b"12345678")
    plan = StepPlan((chunk,), wants_logits=True)
    assert len(PlanEncoder().encode(plan)) == num_numbers
    return plan


PLANS = [
    plan_of(28, 0),
    StepPlan(),
    plan_of(FIRST_MESSAGE - 1, 100),  # the longest that fits in one message
    plan_of(FIRST_MESSAGE, 200),
    plan_of(30, 300),  # nothing of the longer one before is left in it
    plan_of(5 * FIRST_MESSAGE, 400),
    StepPlan(is_last=True),
]


def check_plans(channel: StepChannel, topology: Topology) -> None:
    """Names stay at home. When it is called again, all sequences are known."""
    for plan in PLANS:
        if topology.rank == 0:
            channel.send_plan(plan)
        else:
            chunks = tuple(replace(chunk, request_id="") for chunk in plan.chunks)
            assert channel.receive_plan() == replace(plan, chunks=chunks)


def check_numbers(channel: StepChannel, topology: Topology) -> None:
    """They keep their order among plans."""
    lists = [[], [-(2**63), 2**63 - 1], list(range(3 * FIRST_MESSAGE))]
    for rank in range(1, topology.world_size):
        for numbers in lists:
            if topology.rank == 0:
                channel.send_numbers([rank, *numbers], rank)
            elif topology.rank == rank:
                assert channel.receive_numbers() == [rank, *numbers]
    check_plans(channel, topology)


def hidden_states(rank: int) -> list[torch.Tensor]:
    numbers = torch.arange(24).view(4, 6) + 100 * rank
    return [numbers.float(), numbers.bfloat16().t(), numbers[:, 1:3], numbers[:0].double(), numbers[0, 0], numbers > 3]


def check_hidden_states(channel: StepChannel, topology: Topology) -> None:
    """From every rank to its like in the next stage, and around the end; two sets before anybody receives one."""
    beside = topology.rank_at((topology.stage - 1) % topology.num_stages, topology.tensor_parallel.rank)
    for shift in (0, 50):
        channel.send_onward(hidden_states(topology.rank + shift))
    dist.barrier()
    for shift in (0, 50):
        expected = hidden_states(beside + shift)
        received = channel.receive_inward([(tensor.shape, tensor.dtype) for tensor in expected])
        for one, other in zip(received, expected, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one, other)
            assert one.is_contiguous()
    assert channel.receive_inward([]) == []


def check_results(channel: StepChannel, topology: Topology) -> None:
    results = [torch.tensor([3, 1, 2**62]), torch.randn(5, 7, generator=torch.manual_seed(0)).t(), torch.empty(0, 9)]
    if topology.rank == topology.rank_at(topology.num_stages - 1, 0):
        for result in results:
            channel.send_result(result)
    if topology.rank == 0:
        for result in results:
            assert torch.equal(channel.receive_result(result.shape, result.dtype), result)


def check_inputs(channel: StepChannel, topology: Topology) -> None:
    def inputs(rank: int) -> list[torch.Tensor]:
        return [torch.full((2, 3), rank, dtype=torch.int64), torch.arange(8.0).view(2, 4).t() * rank]

    for rank in range(1, topology.world_size):
        for tensor in inputs(rank):
            if topology.rank == 0:
                channel.send_to(rank, tensor)
            elif topology.rank == rank:
                assert torch.equal(channel.receive_from_leader(tensor.shape, tensor.dtype), tensor)


def check_that_nobody_waits_to_send(channel: StepChannel, topology: Topology) -> None:
    """The leader's first messages are received after its last ones, and long after it has forgotten their tensors."""
    last = topology.world_size - 1
    if topology.rank == 0:
        for value in (1.0, 2.0):
            channel.send_to(last, torch.full((LARGE,), value))
        torch.full((LARGE,), 3.0)  # where a freed tensor may have been
        channel.send_numbers([7], last)
        channel.send_plan(StepPlan())
        channel.flush()
    else:
        if topology.rank == last:
            assert channel.receive_numbers() == [7]
        assert channel.receive_plan() == StepPlan()
        if topology.rank == last:
            time.sleep(0.5)
            for value in (1.0, 2.0):
                assert bool((channel.receive_from_leader((LARGE,), torch.float32) == value).all())
    channel.flush()
    assert not channel._sending


def check_steps(channel: StepChannel, topology: Topology) -> None:
    """The traffic of generation, `num_stages` plans in flight. What has arrived is kept by nobody."""
    is_last_stage = topology.stage == topology.num_stages - 1
    most = (topology.num_stages + 1) * topology.world_size  # a step's messages of one rank: plans, or one hidden state
    for index in range(40):
        if topology.rank == 0:
            channel.send_plan(StepPlan())
        else:
            channel.receive_plan()
        states = torch.tensor([float(index)])
        if topology.stage:
            (states,) = channel.receive_inward([((1,), torch.float32)])
        if not is_last_stage:
            channel.send_onward([states + 1])
        elif topology.tensor_parallel.rank == 0:
            channel.send_result(states)
        if topology.rank == 0 and index >= topology.num_stages - 1:
            oldest = index - topology.num_stages + 1
            assert channel.receive_result((1,), torch.float32).item() == oldest + topology.num_stages - 1
        assert len(channel._sending) <= most + topology.num_stages + 1
    for _ in range(topology.num_stages - 1):
        if topology.rank == 0:
            channel.receive_result((1,), torch.float32)


def check_many_small_messages(channel: StepChannel, topology: Topology) -> None:
    """More than shared memory has room for before the first is received, some of them larger than others."""
    last = topology.world_size - 1
    lists = [list(range(index, index + (5000 if index % 7 == 0 else 3))) for index in range(100)]
    if topology.rank == 0:
        for numbers in lists:
            channel.send_numbers(numbers, last)
    dist.barrier()
    if topology.rank == last:
        for numbers in lists:
            assert channel.receive_numbers() == numbers
    channel.flush()


def check_that_room_is_used_again(channel: StepChannel, topology: Topology) -> None:
    """Several times as much as there is room for, each message answered before the next; of all lengths."""
    answering = topology.rank_at(topology.num_stages - 1, 0)
    for index in range(300):
        numbers = list(range(index, 5 * index))
        if topology.rank == 0:
            channel.send_numbers(numbers, answering)
            assert channel.receive_result((len(numbers),), torch.int64).tolist() == numbers
        elif topology.rank == answering:
            assert channel.receive_numbers() == numbers
            channel.send_result(torch.tensor(numbers, dtype=torch.int64))
    assert not channel._sending or not channel._rings


def check_wrong_length(channel: StepChannel, topology: Topology) -> None:
    last = topology.world_size - 1
    if topology.rank == 0:
        channel.send_to(last, torch.zeros(3))
    elif topology.rank == last:
        try:
            channel.receive_from_leader((4,), torch.float32)
        except RuntimeError as error:
            assert str(error) == "rank 0 has sent 12 bytes, where 16 were expected"
        else:
            raise AssertionError("three numbers were taken for four")


def check_patience(topology: Topology) -> None:
    """Last of all: a group in which somebody has waited in vain is of no more use."""
    dist.barrier()
    # The ranks have to find each other within it, on a busy machine too.
    channel = StepChannel(replace(topology, patience=timedelta(seconds=5)))
    waits: list[Callable[[], object]] = [channel.receive_plan, lambda: channel.receive_inward([((1,), torch.float32)])]
    if 0 < topology.rank <= len(waits):
        started = time.monotonic()
        try:
            waits[topology.rank - 1]()
        except RuntimeError:
            assert 4.9 < time.monotonic() - started < 30
        else:
            raise AssertionError("something came from nobody")
    dist.barrier()


def main(num_stages: int, tensor_parallel_size: int, way: str) -> None:
    if way == "gloo":
        shared_memory.native = None  # type: ignore[assignment]
    topology = open_topology(tensor_parallel_size, "cpu", num_threads=1, pipeline_parallel_size=num_stages)
    assert topology.rank == topology.rank_at(topology.stage, topology.tensor_parallel.rank)
    assert (topology.num_stages, topology.tensor_parallel.size) == (num_stages, tensor_parallel_size)
    assert topology.stage == topology.rank // tensor_parallel_size
    channel = StepChannel(topology)
    for check in (
        check_plans,
        check_numbers,
        check_hidden_states,
        check_results,
        check_inputs,
        check_that_nobody_waits_to_send,
        check_steps,
        check_many_small_messages,
        check_that_room_is_used_again,
    ):
        check(channel, topology)
        channel.flush()
    if way == "shared":
        assert channel._rings
        check_wrong_length(channel, topology)
    check_patience(topology)
    print(f"rank {topology.rank} is content\n", end="", flush=True)
    topology.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
