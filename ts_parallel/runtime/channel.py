"""All that one rank tells another: the leader's plans and inputs, hidden states from stage to stage, results back.

From rank to rank, and no sender waits for its receiver: through memory where both are on one host, as far as there is
room, else through torch.distributed. Knows ranks and tensors, not what they mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from enum import IntEnum

import torch
import torch.distributed as dist

from ts_parallel.runtime.plan_codec import PlanDecoder, PlanEncoder
from ts_parallel.shared_memory import Ring, open_rings
from ts_parallel.step_plan import StepPlan
from ts_parallel.topology import Topology

# Where torch.distributed carries them, the first message has room for most plans; only a longer one needs a second.
FIRST_MESSAGE = 1024

_LEADER = 0


class _Kind(IntEnum):
    """Messages of one kind between two ranks arrive in order; those of different kinds do not wait for each other."""

    NUMBERS = 1
    HIDDEN = 2
    RESULT = 3
    INPUT = 4


# Bytes of each kind that lie in memory between two ranks at most; what finds no room goes through torch.distributed.
# A plan has about 100 bytes a sequence and 8 a new token, but sequences that begin with blocks of the prefix cache have
# all of those at once: 128 of 4,000 tokens are 270 KB, 4 MB where penalties count their tokens, and a mask of 128,000
# tokens is 16 KB.
_ROOM = {_Kind.NUMBERS: 2**23, _Kind.HIDDEN: 2**21, _Kind.RESULT: 2**19, _Kind.INPUT: 2**19}

_Route = tuple[int, int, _Kind]
"""Who sends, who receives, what."""


class StepChannel:
    """One rank's end of the traffic. Owns its process groups and rings, and what is on its way out through the former
    until it has arrived.

    Every rank makes one, at the same time. A send returns at once, and its tensor must not be written to afterwards; a
    receive waits, at most the topology's `patience`, and raises RuntimeError then or where the sender is gone. Only
    hidden states stay on the device; everything else goes over the CPU. One thread may send while another receives. A
    rank alone joins no group and sends to nobody.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._num_stages = topology.num_stages
        self._tensor_parallel_rank = topology.tensor_parallel.rank
        self._sending: deque[tuple[int, dist.Work, torch.Tensor]] = deque()  # with the number of plans before it
        self._num_plans = 0
        self._encoder = PlanEncoder(with_choice=self._num_stages > 1)  # in one stage, the leader chooses
        self._decoder = PlanDecoder()
        self._group: dist.ProcessGroup | None = None
        self._hidden_group: dist.ProcessGroup | None = None
        self._rings: dict[_Route, Ring] = {}
        if topology.world_size > 1:
            patience, on_gpu = topology.patience, topology.device.type == "cuda"
            self._group = dist.new_group(backend="gloo", timeout=patience)
            self._hidden_group = dist.new_group(backend="nccl", timeout=patience) if on_gpu else self._group
            routes = {route: (route[0], route[1], _ROOM[route[2]]) for route in _routes(topology)}
            self._rings = open_rings(self._group, routes, patience)

    def send_plan(self, plan: StepPlan) -> None:
        """The leader's next plan to every other rank. With it, at most `num_stages` may be without a result.

        All get all plans, in one order: of a sequence they are told what is new since its last chunk (`plan_codec`).
        """
        self._begin_plan()
        if self._topology.world_size == 1:
            return
        numbers = self._encoder.encode(plan)
        for rank in range(1, self._topology.world_size):
            self._send_numbers(numbers, rank)

    def receive_plan(self) -> StepPlan:
        """The next plan; where there is one stage, without what only the leader needs: how tokens are chosen."""
        plan = self._decoder.decode(self._receive_numbers())
        self._begin_plan()
        return plan

    def send_numbers(self, numbers: Sequence[int], rank: int) -> None:
        """int64 numbers, any many, from the leader to `rank`, in one order with the plans."""
        self._send_numbers(torch.tensor(numbers, dtype=torch.int64), rank)

    def receive_numbers(self) -> list[int]:
        numbers: list[int] = self._receive_numbers().tolist()
        return numbers

    def _send_numbers(self, numbers: torch.Tensor, rank: int) -> None:
        if (self._topology.rank, rank, _Kind.NUMBERS) in self._rings:
            self._send(numbers, rank, _Kind.NUMBERS)
        else:
            for message in _to_messages(numbers):
                self._send(message, rank, _Kind.NUMBERS)

    def _receive_numbers(self) -> torch.Tensor:
        ring = self._rings.get((_LEADER, self._topology.rank, _Kind.NUMBERS))
        if ring is not None:
            num_bytes, _ = ring.wait()
            return self._receive((num_bytes // 8,), torch.int64, _LEADER, _Kind.NUMBERS)
        first = self._receive((FIRST_MESSAGE,), torch.int64, _LEADER, _Kind.NUMBERS)
        length = int(first[0])
        numbers = first[1 : 1 + length]
        if len(numbers) == length:
            return numbers
        return torch.cat([numbers, self._receive((length - len(numbers),), torch.int64, _LEADER, _Kind.NUMBERS)])

    def send_onward(self, tensors: Sequence[torch.Tensor]) -> None:
        """Hidden states, on this rank's device, to this rank's like in the next stage; after the last comes the first.

        Their number, shapes and types are not sent: the receiver knows them.
        """
        for tensor in tensors:
            self._send(tensor, self._rank_beside(1), _Kind.HIDDEN)

    def receive_inward(self, specs: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
        """What this rank's like in the stage before has sent onward, of these shapes and types, on this device."""
        return [self._receive(shape, dtype, self._rank_beside(-1), _Kind.HIDDEN) for shape, dtype in specs]

    def send_result(self, tensor: torch.Tensor) -> None:
        """From the first rank of the last stage to the leader, where that is another one."""
        self._send(tensor.cpu(), _LEADER, _Kind.RESULT)

    def receive_result(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The leader: the next result, on the CPU."""
        return self._receive(shape, dtype, self._topology.rank_at(self._num_stages - 1, 0), _Kind.RESULT)

    def send_to(self, rank: int, tensor: torch.Tensor) -> None:
        """An input tensor from the leader to another rank."""
        self._send(tensor.cpu(), rank, _Kind.INPUT)

    def receive_from_leader(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next input tensor of the leader's, on this rank's device."""
        return self._receive(shape, dtype, _LEADER, _Kind.INPUT).to(self._topology.device)

    def flush(self) -> None:
        """Wait until all that was sent has arrived."""
        while self._sending:
            self._let_go()

    def _begin_plan(self) -> None:
        """Let go of what was sent more than `num_stages` plans ago: as no more are in flight, it has arrived.

        gloo's sends do not say that they are done before they are waited for, so there is no asking them.
        """
        self._num_plans += 1
        while self._sending and self._num_plans - self._sending[0][0] > self._num_stages:
            self._let_go()

    def _let_go(self) -> None:
        _, work, _ = self._sending[0]
        work.wait()
        self._sending.popleft()

    def _rank_beside(self, distance: int) -> int:
        stage = (self._topology.stage + distance) % self._num_stages
        return self._topology.rank_at(stage, self._tensor_parallel_rank)

    def _send(self, tensor: torch.Tensor, rank: int, kind: _Kind) -> None:
        tensor = tensor.contiguous()
        ring = self._rings.get((self._topology.rank, rank, kind))
        if ring is not None and ring.send(tensor):
            return
        work = dist.isend(tensor, rank, group=self._group_of(kind), tag=kind)
        assert work is not None
        self._sending.append((self._num_plans, work, tensor))

    def _receive(self, shape: Sequence[int], dtype: torch.dtype, rank: int, kind: _Kind) -> torch.Tensor:
        device = self._topology.device if kind is _Kind.HIDDEN else "cpu"
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
        ring = self._rings.get((rank, self._topology.rank, kind))
        if ring is None or not _took(ring, tensor, rank):
            dist.recv(tensor, rank, group=self._group_of(kind), tag=kind)
        return tensor

    def _group_of(self, kind: _Kind) -> dist.ProcessGroup | None:
        return self._hidden_group if kind is _Kind.HIDDEN else self._group


def _routes(topology: Topology) -> Iterator[_Route]:
    """All ways that messages take on CPUs, the same on every rank."""
    num_stages, size = topology.num_stages, topology.tensor_parallel.size
    for rank in range(1, topology.world_size):
        yield _LEADER, rank, _Kind.NUMBERS
        yield _LEADER, rank, _Kind.INPUT
    if num_stages > 1:
        yield topology.rank_at(num_stages - 1, 0), _LEADER, _Kind.RESULT
    if num_stages > 1 and topology.device.type == "cpu":
        for rank in range(topology.world_size):
            yield rank, (rank + size) % topology.world_size, _Kind.HIDDEN


def _took(ring: Ring, tensor: torch.Tensor, rank: int) -> bool:
    """Whether the next message has come through the ring into `tensor`; else it is still to come, by the other way.

    Raises:
        RuntimeError: it has another length.
    """
    num_bytes, is_here = ring.wait()
    if num_bytes != tensor.nbytes:
        raise RuntimeError(f"rank {rank} has sent {num_bytes} bytes, where {tensor.nbytes} were expected")
    ring.take(tensor)
    return is_here


def _to_messages(numbers: torch.Tensor) -> list[torch.Tensor]:
    """Their count and the first of them in a message of fixed length; the rest, if any, in another."""
    first = torch.zeros(FIRST_MESSAGE, dtype=torch.int64)
    first[0] = len(numbers)
    fitting = min(len(numbers), FIRST_MESSAGE - 1)
    first[1 : 1 + fitting] = numbers[:fitting]
    return [first, numbers[fitting:].clone()] if fitting < len(numbers) else [first]
