"""Run by torchrun: one model cut into stages over all ranks, in every schedule: `batch.py TENSOR_PARALLEL_SIZE`.

Rank 0 compares each micro-batch's output with the uncut model's, and says so at the end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch

from ts_parallel.partition.program import Crossing
from ts_parallel.runtime.batch.batch_runner import BatchRunner
from ts_parallel.runtime.channel import StepChannel
from ts_parallel.topology import TensorParallelGroup, Topology, open_topology

WIDTH = 6
VOCABULARY = 11
Inputs = Mapping[str, torch.Tensor]

HIDDEN = Crossing("hidden", torch.float64, ("ids[0]", "ids[1]", WIDTH))
LENGTHS = Crossing("lengths", torch.int64, ("ids[0]",))
OUTPUT = Crossing("output", torch.float64, ("ids[0]", WIDTH))


class Layer:
    """One stage of the model: the first one embeds, every second one sees the mask, the last one pools.

    Its product is a sum over the tensor-parallel ranks, each of which has some of the rows. Beside the hidden state
    goes a tensor of another type and shape, so that both must be received as they were sent.
    """

    def __init__(self, number: int, num_stages: int, group: TensorParallelGroup) -> None:
        generator = torch.Generator().manual_seed(number)
        weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        self._embedding = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(99)).double()
        rows = slice(group.rank * WIDTH // group.size, (group.rank + 1) * WIDTH // group.size)
        self._weight, self._rows, self._group = weight[rows], rows, group
        self._is_first, self._is_last = number == 0, number == num_stages - 1
        self._sees_mask = number % 2 == 1 or self._is_last
        self.inputs = ("ids",) * self._is_first + ("mask",) * self._sees_mask
        self.received: Sequence[Crossing] = () if self._is_first else (HIDDEN, LENGTHS)
        self.sent: Sequence[Crossing] = (OUTPUT,) if self._is_last else (HIDDEN, LENGTHS)

    def __call__(self, step: None, inputs: Inputs, received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._is_first:
            hidden, lengths = self._embedding[inputs["ids"]], torch.arange(len(inputs["ids"]))
        else:
            hidden, lengths = received
        hidden = self._group.all_reduce(hidden[..., self._rows] @ self._weight).tanh()
        if self._sees_mask:
            hidden = hidden * inputs["mask"].unsqueeze(-1)
        if self._is_last:
            return [hidden.sum(dim=1) + lengths.unsqueeze(-1)]
        return [hidden, lengths + 1]


def micro_batch(index: int) -> dict[str, torch.Tensor]:
    """Each of another size; one that no stage reads is among the inputs."""
    generator = torch.Generator().manual_seed(index)
    shape = (1 + index % 3, 1 + 4 * index % 7)
    ids = torch.randint(VOCABULARY, shape, generator=generator)
    mask = torch.randint(2, shape, generator=generator).double()
    return {"ids": ids, "mask": mask, "unread": torch.zeros(3)}


def plainly(inputs: Inputs, num_stages: int) -> torch.Tensor:
    tensors: list[torch.Tensor] = []
    for number in range(num_stages):
        tensors = Layer(number, num_stages, TensorParallelGroup(0, 1))(None, inputs, tensors)
    return tensors[0]


def check_runs(runner: BatchRunner, num_ranks: int, num_laps: int) -> None:
    """As many micro-batches as make less than a group, groups, and a rest; never more in flight than there is room."""
    num_stages = num_ranks * num_laps
    for count in (0, 1, num_ranks, num_ranks + 1, 3 * num_ranks - 1):
        taken = []

        def batches(count: int = count, taken: list[int] = taken) -> Iterator[Inputs]:
            for index in range(count):
                taken.append(index)
                yield micro_batch(index)

        outputs = []
        for output in runner.run(batches()):
            outputs.append(output)
            assert len(taken) - len(outputs) < num_ranks, (taken, len(outputs))
        expected = [plainly(micro_batch(index), num_stages) for index in range(count)]
        for ours, theirs in zip(outputs, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            assert not ours.is_inference()
        runner.sign_of_life()


def check_interruptions(runner: BatchRunner, num_stages: int) -> None:
    """A reader that leaves, a source that fails, an input that is missing: the next run is as if nothing had been."""

    def failing() -> Iterator[Inputs]:
        yield micro_batch(7)
        yield micro_batch(8)
        raise RuntimeError("out of items")

    outputs = runner.run(micro_batch(index) for index in range(9))
    next(outputs)
    outputs.close()
    assert_next_run_is_right(runner, num_stages)
    for source, says in ((failing(), "out of items"), (iter([{"ids": micro_batch(1)["ids"]}]), "'mask'")):
        try:
            list(runner.run(source))
        except (RuntimeError, ValueError) as error:
            assert says in str(error)
        else:
            raise AssertionError(says)
        assert_next_run_is_right(runner, num_stages)


def assert_next_run_is_right(runner: BatchRunner, num_stages: int) -> None:
    (output,) = runner.run([micro_batch(5)])
    torch.testing.assert_close(output, plainly(micro_batch(5), num_stages), rtol=1e-12, atol=1e-12)


def run(topology: Topology, num_laps: int) -> None:
    num_stages = topology.num_stages * num_laps
    numbers = range(topology.stage, num_stages, topology.num_stages)
    stages = [Layer(number, num_stages, topology.tensor_parallel) for number in numbers]
    inputs = [Layer(number, num_stages, TensorParallelGroup(0, 1)).inputs for number in range(num_stages)]
    runner = BatchRunner(stages, StepChannel(topology), topology, inputs, OUTPUT)
    if topology.rank:
        runner.follow()
        return
    check_runs(runner, topology.num_stages, num_laps)
    check_interruptions(runner, num_stages)
    runner.stop_followers()
    print(f"equal over {topology.num_stages} ranks × {num_laps} laps", flush=True)


def main(tensor_parallel_size: int) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    pipeline_parallel_size = world_size // tensor_parallel_size
    topology = open_topology(tensor_parallel_size, "cpu", num_threads=1, pipeline_parallel_size=pipeline_parallel_size)
    for num_laps in (1, 2, 3):
        run(topology, num_laps)
    topology.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
