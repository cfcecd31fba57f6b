"""Models in parts over a model's stages: what a part leaves behind stays on its rank for the parts that come after it.

Each part, as an encoder or one step of a decoder, is cut into as many stages as there are pipeline ranks, one of each
on a rank. Its micro-batches follow one another through them, as many in flight as there are stages. A micro-batch has a
number, under which each rank keeps what its stages leave behind (keys and values of its own layers) until it is told to
forget it. Knows tensors and shapes, not what they mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ts_parallel.partition.program import KEPT, Crossing
from ts_parallel.runtime.batch.batch_runner import Channel, Stage, decode_specs, encode_specs
from ts_parallel.runtime.leader import Leader
from ts_parallel.topology import Topology

# What the leader says to the other ranks; with `_RUN` come a part, a micro-batch's number and the specs of its inputs,
# with `_FORGET` numbers. No number at all is a sign of life.
_STOP, _PAUSE, _RUN, _FORGET = range(4)

Inputs = Mapping[str, torch.Tensor]
Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Part:
    """What one rank knows of a part."""

    stage: Stage
    """This rank's."""
    kept: tuple[str, ...]
    """The names of what it returns behind what is sent."""
    inputs_by_stage: tuple[tuple[str, ...], ...]
    """The inputs that each stage reads, in the order of the stages."""
    output: Crossing
    """What the last stage makes, one row an item."""

    def given(self, stage: int) -> list[str]:
        """The inputs that the leader gives a stage."""
        return sorted({name for name in self.inputs_by_stage[stage] if not name.startswith(KEPT)})


class PartRunner:
    """Owns this rank's stages and what they leave behind. Rank 0 leads with `run` and `forget`, the others `follow`."""

    def __init__(self, parts: Sequence[Part], channel: Channel, topology: Topology) -> None:
        self._parts = parts
        self._channel = channel
        self._topology = topology
        self._kept: dict[int, dict[str, torch.Tensor]] = {}
        self._in_flight: deque[tuple[int, Sizes, list[torch.Tensor]]] = deque()
        self._leader = Leader(channel, topology.world_size, self._in_flight.clear)

    def run(self, part: int, batches: Iterable[tuple[int, Inputs]]) -> Iterator[torch.Tensor]:
        """The leader: the part's output for each micro-batch, by its number and inputs, on the CPU and in order. A
        micro-batch is taken once there is room. An iterator that is closed early leaves the ranks in step.

        Raises:
            EngineError: an earlier run was broken off by an error, and other ranks wait for what will not come.
            ValueError: a micro-batch lacks an input that the part reads.
        """
        self._leader.refuse_if_broken()
        try:
            for number, inputs in batches:
                self._admit(part, number, inputs)
                if len(self._in_flight) == self._topology.num_stages:
                    yield self._collect()
            while self._in_flight:
                yield self._collect()
        finally:
            self._come_to_rest()

    def forget(self, numbers: Sequence[int]) -> None:
        """The leader: let all ranks drop what was left behind of these micro-batches."""
        self._leader.tell_at_once([_FORGET, *numbers])
        self._drop(numbers)

    def follow(self) -> None:
        """Other ranks: take part in what the leader runs until `stop_followers`."""
        while (numbers := self._channel.receive_numbers()) != [_STOP]:
            if not numbers:
                continue
            kind, *rest = numbers
            if kind == _RUN:
                part, number, *coded = rest
                specs = decode_specs(coded)
                names = self._parts[part].given(self._topology.stage)
                inputs = {name: self._channel.receive_from_leader(*specs[name]) for name in names}
                self._compute(part, number, {name: shape for name, (shape, _) in specs.items()}, inputs)
            elif kind == _FORGET:
                self._drop(rest)
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

    def _admit(self, part: int, number: int, inputs: Inputs) -> None:
        """Start a micro-batch on its way through the stages."""
        size = self._topology.tensor_parallel.size
        given = [self._parts[part].given(stage) for stage in range(self._topology.num_stages)]
        if missing := {name for names in given for name in names} - inputs.keys():
            raise ValueError(f"part {part} reads {sorted(missing)} too, got {sorted(inputs)}")
        with self._leader.in_step():
            specs = {name: (tuple(inputs[name].shape), inputs[name].dtype) for name in sorted(inputs)}
            for rank in range(1, self._topology.world_size):
                self._channel.send_numbers([_RUN, part, number, *encode_specs(specs)], rank)
                for name in given[rank // size]:
                    self._channel.send_to(rank, inputs[name])
            own = {name: inputs[name].to(self._topology.device) for name in given[0]}
            sizes = {name: shape for name, (shape, _) in specs.items()}
            self._in_flight.append((part, sizes, self._compute(part, number, sizes, own)))

    def _collect(self) -> torch.Tensor:
        """The output of the micro-batch that is longest in flight."""
        with self._leader.in_step():
            part, sizes, sent = self._in_flight.popleft()
            if self._topology.num_stages == 1:
                # A copy is no inference tensor, which whoever gets it could not write to.
                output = sent[0].to("cpu", copy=True)
            else:
                made = self._parts[part].output
                output = self._channel.receive_result(made.shape(sizes), made.dtype)
            self._leader.count_result()
            return output

    def _come_to_rest(self) -> None:
        """Finish what is in flight, so that the ranks are where the next run finds them."""
        if self.is_broken:
            return
        while self._in_flight:
            self._collect()
        self._leader.tell_at_once([_PAUSE])

    def _drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._kept.pop(number, None)

    @torch.inference_mode()
    def _compute(self, part: int, number: int, sizes: Sizes, inputs: Inputs) -> list[torch.Tensor]:
        """This rank's stage of a part: what comes in, what goes on, what stays. What goes on is returned too."""
        own, topology = self._parts[part], self._topology
        received: list[torch.Tensor] = []
        if topology.stage > 0:
            specs = [(crossing.shape(sizes), crossing.dtype) for crossing in own.stage.received]
            received = self._channel.receive_inward(specs)
        kept = self._kept.setdefault(number, {})
        made = own.stage(None, {**kept, **inputs}, received)
        sent, left = made[: len(own.stage.sent)], made[len(own.stage.sent) :]
        kept.update(zip(own.kept, left, strict=True))
        if topology.stage < topology.num_stages - 1:
            self._channel.send_onward(sent)
        elif topology.num_stages > 1 and topology.tensor_parallel.rank == 0:
            self._channel.send_result(sent[0])
        return sent
