"""Memory that ranks of one host share, and what they do through it: sums and gathers of a team, rings of messages.

The memory has no name: it ends with the last process that has mapped it, however that one ends. Knows ranks and
tensors on the CPU, not what they mean.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

try:
    from ts_parallel.native import shared_memory as native
except ImportError:  # no compiler where the package was installed, or no Linux
    native = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

K = TypeVar("K")
T = TypeVar("T")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Offer(NamedTuple):
    """One rank's memory, as others of its host can find it; `problem` says why there is none."""

    host: str
    pid: int = 0
    descriptor: int = -1
    name: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Segment:
    """Memory of those `ranks` of a process group that are on this rank's host, all zero at first."""

    ranks: tuple[int, ...]
    memory: torch.Tensor

    @property
    def address(self) -> int:
        return self.memory.data_ptr()


def host_name() -> str:
    """The same for all processes that share a kernel, and for no others."""
    return f"{socket.gethostname()} {_BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ''}"


def open_segment(group: dist.ProcessGroup, num_bytes: int) -> Segment | None:
    """The same memory on all ranks of a host, or None on all of them; the log says why. Every rank of `group` calls it.

    Ranks find it through the process that made it, under `/proc`, so they need the same user and process namespace.
    """
    own = _make_offer(num_bytes)
    offers: list[_Offer] = _exchange(group, own)
    ranks = tuple(rank for rank, offer in enumerate(offers) if offer.host == own.host)
    memory, problem = None, next((offers[rank].problem for rank in ranks if offers[rank].problem), "")
    if not problem:
        try:
            memory = _map(offers[ranks[0]], num_bytes)
        except (OSError, ValueError) as error:
            problem = f"rank {dist.get_rank()} cannot map it: {error}"
    problems = _exchange(group, problem)
    if own.descriptor >= 0:
        os.close(own.descriptor)
    problem = next((problems[rank] for rank in ranks if problems[rank]), "")
    if problem and dist.get_rank(group) == ranks[0]:
        logger.warning("ts_parallel: ranks of one host talk over gloo, not through shared memory: %s", problem)
    return None if problem or memory is None else Segment(ranks, memory)


def _make_offer(num_bytes: int) -> _Offer:
    host = host_name()
    if native is None:
        return _Offer(host, problem="ts_parallel.native.shared_memory is not built")
    name = f"ts_parallel-{secrets.token_hex(8)}"
    try:
        descriptor = os.memfd_create(name)
    except OSError as error:
        return _Offer(host, problem=f"memfd_create: {error}")
    os.ftruncate(descriptor, num_bytes)  # no memory yet, for none of it is touched
    return _Offer(host, os.getpid(), descriptor, name)


def _map(offer: _Offer, num_bytes: int) -> torch.Tensor:
    path = f"/proc/{offer.pid}/fd/{offer.descriptor}"
    found, wanted = os.readlink(path), f"/memfd:{offer.name} (deleted)"
    if found != wanted:  # in another process namespace the number is somebody else's
        raise OSError(f"{path} is {found}, not {wanted}")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
    finally:
        os.close(descriptor)


def _exchange(group: dist.ProcessGroup, own: T) -> list[T]:
    everybody: list[T] = [own] * dist.get_world_size(group)
    dist.all_gather_object(everybody, own, group=group)
    return everybody


class Team:
    """The ranks of a process group, all on one host. Every rank calls the same methods in the same order.

    Each method waits for the others, and raises RuntimeError where one has ended or keeps this one waiting for longer
    than `patience`. One thread at a time.
    """

    def __init__(self, segment: Segment, place: int, patience: timedelta) -> None:
        self._segment = segment
        self._place, self._size = place, len(segment.ranks)
        self._patience = int(patience.total_seconds())
        self._types = {
            torch.float32: native.FLOAT32,
            torch.bfloat16: native.BFLOAT16,
            torch.float16: native.FLOAT16,
        }
        native.enter_team(segment.address, place, dist.get_rank())
        self.for_kernels = native.make_team(segment.address, place, self._size, self._patience)
        """The same team, with which `kernels.run_stack` sums bfloat16."""

    def can_sum(self, tensor: torch.Tensor) -> bool:
        return tensor.dtype in self._types

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place, where `can_sum`: added in float32 and rank order, so with the same bits."""
        whole = tensor.contiguous()
        address, type_number = self._segment.address, self._types[tensor.dtype]
        native.all_reduce(
            address, self._place, self._size, whole.data_ptr(), whole.numel(), type_number, self._patience
        )
        if whole is not tensor:
            tensor.copy_(whole)

    def gather(self, tensor: torch.Tensor, sizes: Sequence[int], *, is_wanted: bool) -> torch.Tensor | None:
        """Concatenation over the ranks along the last dim, of which rank r holds `sizes[r]`, where it `is_wanted`.

        Who does not want it only gives, and need not wait.
        """
        part = tensor.contiguous()
        whole = part.new_empty(*part.shape[:-1], sum(sizes)) if is_wanted else None
        widths = tuple(size * part.element_size() for size in sizes)
        num_rows = part.shape[:-1].numel()
        address = 0 if whole is None else whole.data_ptr()
        native.gather(self._segment.address, self._place, part.data_ptr(), num_rows, address, self._patience, widths)
        return whole


def open_team(group: dist.ProcessGroup, patience: timedelta) -> Team | None:
    """The ranks of `group` as a team; None where they are not all on one host, or share no memory there."""
    size = dist.get_world_size(group)
    segment = open_segment(group, 0 if native is None else native.team_bytes(size))
    if segment is None or len(segment.ranks) < size:
        return None
    return Team(segment, dist.get_rank(group), patience)


class Ring:
    """Messages from one rank to another of its host, in order. Each end is used by one thread at a time.

    What waits raises RuntimeError where the other end has ended or `patience` has.
    """

    def __init__(self, segment: Segment, start: int, num_bytes: int, patience: timedelta) -> None:
        self._segment = segment  # it lives as long as this
        self._address, self._num_bytes = segment.address + start, num_bytes
        self._patience = int(patience.total_seconds())

    def enter(self, *, is_sender: bool) -> None:
        native.enter_ring(self._address, is_sender, dist.get_rank())

    def send(self, tensor: torch.Tensor) -> bool:
        """Whether the contiguous tensor is in the ring; else it is announced there, and has to go by another way."""
        return native.send(self._address, self._num_bytes, tensor.data_ptr(), tensor.nbytes, self._patience)

    def wait(self) -> tuple[int, bool]:
        """The bytes of the next message, and whether they are in the ring."""
        return native.await_message(self._address, self._num_bytes, self._patience)

    def take(self, tensor: torch.Tensor) -> None:
        """The message that was waited for, into a contiguous tensor of its bytes, if it is in the ring; it is gone
        from there."""
        native.take(self._address, self._num_bytes, tensor.data_ptr())


def open_rings(
    group: dist.ProcessGroup, routes: Mapping[K, tuple[int, int, int]], patience: timedelta
) -> dict[K, Ring]:
    """The rings of those routes that begin or end at this rank and whose ends share a host's memory. Every rank calls
    it, with the same routes.

    Args:
        routes: for each the rank that sends, the one that receives, and the bytes that are under way at most.
    """
    starts, end = {}, 0
    for key, (_, _, num_bytes) in routes.items():
        starts[key] = end
        end += 0 if native is None else native.ring_bytes(num_bytes)
    segment = open_segment(group, end)
    rings: dict[K, Ring] = {}
    own = dist.get_rank(group)
    for key, (sender, receiver, num_bytes) in routes.items():
        if segment is not None and own in (sender, receiver) and {sender, receiver} <= set(segment.ranks):
            rings[key] = Ring(segment, starts[key], num_bytes, patience)
            rings[key].enter(is_sender=own == sender)
    return rings
