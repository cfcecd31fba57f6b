"""Batch inference over a model's stages: micro-batches in flight, and one rank's part in each of them.

The schedule is GPipe's (Huang et al. 2019) without its backward pass, over looped stages (Narayanan et al. 2021): with
p pipeline ranks and v stages on each, stage k lives on pipeline rank k % p, and each micro-batch passes every rank v
times, a lap each. Up to p micro-batches make a group, whose laps follow one another. So every rank idles for
(p − 1) / (v·m + p − 1) of the time that m micro-batches take. Knows tensors and shapes, not what they mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ts_parallel.partition.program import Crossing
from ts_parallel.runtime.leader import Leader
from ts_parallel.topology import Topology

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name of each model input → its shape and element type."""

# What the leader says to the other ranks; with `_ADMIT` come a micro-batch's specs. No number at all is a sign of life.
_STOP, _PAUSE, _ADMIT, _LATER_LAPS = range(4)
_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class Stage(Protocol):
    """What the runner needs of a stage: `runtime.stage.Stage`."""

    @property
    def inputs(self) -> Sequence[str]:
        """Names of the model inputs that it reads."""

    @property
    def received(self) -> Sequence[Crossing]: ...

    @property
    def sent(self) -> Sequence[Crossing]: ...

    def __call__(
        self, step: None, inputs: Mapping[str, torch.Tensor], received: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """What goes to the next stage; on the last one, the model's output alone."""


class Channel(Protocol):
    """What the runner needs of `runtime.channel.StepChannel`. No send waits for its receiver."""

    def send_numbers(self, numbers: Sequence[int], rank: int) -> None: ...

    def receive_numbers(self) -> list[int]: ...

    def send_to(self, rank: int, tensor: torch.Tensor) -> None: ...

    def receive_from_leader(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...

    def send_onward(self, tensors: Sequence[torch.Tensor]) -> None: ...

    def receive_inward(self, specs: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]: ...

    def send_result(self, tensor: torch.Tensor) -> None: ...

    def receive_result(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...

    def flush(self) -> None: ...


def encode_specs(specs: Specs) -> list[int]:
    """Of each input the bytes of its name, its type's number and its shape, counted."""
    numbers = []
    for name, (shape, dtype) in specs.items():
        letters = name.encode()
        numbers += [len(letters), *letters, _DTYPES.index(dtype), len(shape), *shape]
    return numbers


def decode_specs(numbers: Sequence[int]) -> Specs:
    specs, at = {}, 0
    while at < len(numbers):
        after_name = at + 1 + numbers[at]
        name = bytes(numbers[at + 1 : after_name]).decode()
        dtype, num_dims = numbers[after_name : after_name + 2]
        at = after_name + 2 + num_dims
        specs[name] = (tuple(numbers[after_name + 2 : at]), _DTYPES[dtype])
    return specs


@dataclass
class _MicroBatch:
    """One micro-batch on this rank: its inputs' shapes, those inputs that are read here, what the last lap left."""

    sizes: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, torch.Tensor]
    carried: list[torch.Tensor] = field(default_factory=list)


class BatchRunner:
    """Owns this rank's stages and the micro-batches in flight. Rank 0 leads with `run`, the others `follow`."""

    def __init__(
        self,
        stages: Sequence[Stage],
        channel: Channel,
        topology: Topology,
        inputs_by_stage: Sequence[Sequence[str]],
        output: Crossing,
    ) -> None:
        """
        Args:
            stages: this rank's, one for each lap.
            inputs_by_stage: the model inputs that each stage of the whole model reads, in the order of the stages.
            output: the model's output, one row an item.
        """
        self._stages = stages
        self._channel = channel
        self._topology = topology
        self._output = output
        self._num_stages = len(stages) * topology.num_stages
        assert len(inputs_by_stage) == self._num_stages
        by_place = [
            {name for stage in inputs_by_stage[place :: topology.num_stages] for name in stage}
            for place in range(topology.num_stages)
        ]
        size = topology.tensor_parallel.size
        self._inputs_by_rank = [by_place[rank // size] for rank in range(topology.world_size)]
        self._leader = Leader(channel, topology.world_size, self._forget_all)
        self._group: list[_MicroBatch] = []  # those that have begun, but not their later laps
        self._in_flight: deque[_MicroBatch] = deque()

    def run(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> Generator[torch.Tensor, None, None]:
        """The leader: each micro-batch's output, on the CPU and in order. A micro-batch is taken once there is room.

        With one stage a rank, at most p micro-batches are in flight; with more, the later laps of a group begin once it
        is full or `batches` has ended. A generator that is closed early leaves the runner fit for the next run.

        Raises:
            EngineError: an earlier run was broken off by an error, and other ranks wait for what will not come.
            ValueError: a micro-batch lacks an input that the model reads.
        """
        self._leader.refuse_if_broken()
        try:
            for inputs in batches:
                self._admit(inputs)
                if len(self._group) == self._topology.num_stages:  # never with one stage a rank
                    self._run_later_laps()
                while len(self._in_flight) == self._topology.num_stages:
                    yield self._collect()
            self._run_later_laps()
            while self._in_flight:
                yield self._collect()
        finally:
            self._come_to_rest()

    def follow(self) -> None:
        """Other ranks: take part in the leader's runs until `stop_followers`."""
        while (numbers := self._channel.receive_numbers()) != [_STOP]:
            if not numbers:
                continue
            kind, *rest = numbers
            if kind == _ADMIT:
                specs = decode_specs(rest)
                names = sorted(self._inputs_by_rank[self._topology.rank])
                self._begin(specs, {name: self._channel.receive_from_leader(*specs[name]) for name in names})
            elif kind == _LATER_LAPS:
                self._go_on()
            elif kind == _PAUSE:
                self._channel.flush()
        self._channel.flush()

    @property
    def is_broken(self) -> bool:
        """Whether an error has left the ranks out of step, so that nothing can be run any more."""
        return self._leader.is_broken

    @property
    def progress(self) -> int | None:
        """The leader: how many micro-batches are done, while it waits for another; None while it does not. From any
        thread."""
        return self._leader.progress

    def stop_followers(self) -> None:
        self._leader.stop([_STOP])

    def sign_of_life(self) -> None:
        """The leader, from any thread: keep the other ranks patient, who take it for dead after some silence."""
        self._leader.sign_of_life()

    def _admit(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Start a micro-batch: its first lap."""
        wanted = set().union(*self._inputs_by_rank)
        if missing := wanted - inputs.keys():
            raise ValueError(f"the model reads {sorted(wanted)}; {sorted(missing)} is missing, got {sorted(inputs)}")
        with self._leader.in_step():
            specs = {name: (tuple(inputs[name].shape), inputs[name].dtype) for name in sorted(wanted)}
            for rank in range(1, self._topology.world_size):
                self._channel.send_numbers([_ADMIT, *encode_specs(specs)], rank)
                for name in sorted(self._inputs_by_rank[rank]):
                    self._channel.send_to(rank, inputs[name])
            own = {name: inputs[name].to(self._topology.device) for name in self._inputs_by_rank[0]}
            self._in_flight.append(self._begin(specs, own))

    def _run_later_laps(self) -> None:
        if self._group:
            with self._leader.in_step():
                self._leader.tell([_LATER_LAPS])
                self._go_on()

    def _collect(self) -> torch.Tensor:
        """The output of the micro-batch that is longest in flight."""
        with self._leader.in_step():
            micro_batch = self._in_flight.popleft()
            if self._topology.num_stages == 1:
                # A copy is no inference tensor, which whoever gets it could not write to.
                output = micro_batch.carried[0].to("cpu", copy=True)
            else:
                output = self._channel.receive_result(self._output.shape(micro_batch.sizes), self._output.dtype)
            self._leader.count_result()
            return output

    def _come_to_rest(self) -> None:
        """Finish what is in flight, so that the ranks are where the next run finds them."""
        if self.is_broken:
            return
        self._run_later_laps()
        while self._in_flight:
            self._collect()
        self._leader.tell_at_once([_PAUSE])

    def _forget_all(self) -> None:
        self._group.clear()
        self._in_flight.clear()

    def _begin(self, specs: Specs, inputs: Mapping[str, torch.Tensor]) -> _MicroBatch:
        """A micro-batch's first lap on this rank."""
        micro_batch = _MicroBatch({name: shape for name, (shape, _) in specs.items()}, inputs)
        if len(self._stages) > 1:
            self._group.append(micro_batch)
        self._compute(micro_batch, 0)
        return micro_batch

    def _go_on(self) -> None:
        """The group's other laps on this rank."""
        for lap in range(1, len(self._stages)):
            for micro_batch in self._group:
                self._compute(micro_batch, lap)
        self._group.clear()

    @torch.inference_mode()
    def _compute(self, micro_batch: _MicroBatch, lap: int) -> None:
        """This rank's stage of a lap: what comes in, what goes on."""
        stage, number = self._stages[lap], lap * self._topology.num_stages + self._topology.stage
        is_alone, is_last = self._topology.num_stages == 1, number == self._num_stages - 1
        received = micro_batch.carried
        if number > 0 and not is_alone:
            specs = [(crossing.shape(micro_batch.sizes), crossing.dtype) for crossing in stage.received]
            received = self._channel.receive_inward(specs)
        sent = stage(None, micro_batch.inputs, received)
        if is_alone:
            micro_batch.carried = sent
        elif not is_last:
            self._channel.send_onward(sent)
        elif self._topology.tensor_parallel.rank == 0:
            self._channel.send_result(sent[0])
