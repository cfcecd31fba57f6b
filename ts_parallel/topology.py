"""Which rank this process is, on which device, and how the ranks of a tensor-parallel group talk.

Ranks of one host talk through its memory, all others, and those on GPUs, through torch.distributed. Knows process
groups and tensors, not models.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ts_parallel.errors import TopologyError
from ts_parallel.shared_memory import Team, host_name, open_team

T = TypeVar("T")

# Ranks wait for each other while the slowest of them loads; a rank that dies is noticed by torchrun, not by this.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Once all have loaded, a rank that hears nothing for so long of what it waits for takes the other one for dead. The
# engine gives signs of life well within it.
PATIENCE = timedelta(seconds=120)
# Whether torchrun's own store is that of its ranks too; else the first makes one, at the port that torchrun has chosen.
_SHARES_ITS_STORE = "TORCHELASTIC_USE_AGENT_STORE"


@dataclass(frozen=True)
class TensorParallelGroup:
    """The ranks that share every layer. Tensors on the meta device pass through with the right shape and no traffic."""

    rank: int
    size: int
    process_group: dist.ProcessGroup | None = None
    team: Team | None = field(default=None, compare=False, repr=False)
    """The same ranks, where they share a host's memory."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; every rank gets the same bits."""
        if self.size == 1 or tensor.is_meta:
            return tensor
        if self.team is not None and self.team.can_sum(tensor):
            self.team.all_reduce(tensor)
        else:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def from_own_start(self, numbers: torch.Tensor, starts: tuple[int, ...]) -> torch.Tensor:
        """`numbers` counted from the start of this rank's part, `starts[rank]`."""
        return numbers - starts[self.rank]

    def own_part(self, tensor: torch.Tensor, pieces: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """This rank's `(start, length)` of `pieces` along the last dim."""
        return tensor.narrow(-1, *pieces[self.rank])

    def all_gather(self, tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        """Concatenation over the ranks along the last dim, where rank r holds `sizes[r]` of it."""
        if self.size == 1:
            return tensor
        whole = tensor.new_empty(*tensor.shape[:-1], sum(sizes))
        if tensor.is_meta:
            return whole
        if self.team is not None:
            gathered = self.team.gather(tensor, sizes, is_wanted=True)
            assert gathered is not None
            return gathered
        padded = _widen(tensor, sizes)
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.process_group)
        return torch.cat(_narrow(parts, sizes), dim=-1, out=whole)

    def gather(self, tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        """`all_gather` for the first rank only; None on the others, which need not wait for it."""
        is_wanted = self.rank == 0
        if self.size == 1:
            return tensor
        if self.team is not None:
            return self.team.gather(tensor, sizes, is_wanted=is_wanted)
        if not tensor.shape[:-1].numel():
            return tensor.new_empty(*tensor.shape[:-1], sum(sizes)) if is_wanted else None
        padded = _widen(tensor, sizes)
        parts = [torch.empty_like(padded) for _ in sizes] if is_wanted else None
        dist.gather(padded, parts, group_dst=0, group=self.process_group)
        return torch.cat(_narrow(parts, sizes), dim=-1) if parts else None


def _widen(tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """torch.distributed exchanges tensors of one shape: as wide as the widest."""
    return torch.nn.functional.pad(tensor, (0, max(sizes) - tensor.shape[-1])).contiguous()


def _narrow(parts: list[torch.Tensor], sizes: tuple[int, ...]) -> list[torch.Tensor]:
    return [part[..., :size] for part, size in zip(parts, sizes, strict=True)]


@dataclass(frozen=True)
class Topology:
    """This process among all ranks. `mesh` has the axes (pp, tp): rank = stage × ranks of a stage + rank in the stage.

    Rank 0, the first of the first stage, leads.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    tensor_parallel: TensorParallelGroup
    num_threads: int = 1
    """CPU threads that this rank may compute with."""
    patience: timedelta = PATIENCE
    """Longest that a rank waits for another, once all have loaded."""

    @cached_property  # for each step asks, and the mesh looks its groups up
    def stage(self) -> int:
        """The pipeline stage of this rank, from 0."""
        return self.mesh.get_local_rank("pp")

    @property
    def host(self) -> str:
        """The same on all ranks that share a host."""
        return host_name()

    @cached_property
    def num_stages(self) -> int:
        return self.mesh.size(0)

    def use_device(self) -> None:
        """Launch from this thread on this rank's GPU: each thread of a process begins with the first one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def rank_at(self, stage: int, tensor_parallel_rank: int) -> int:
        return stage * self.mesh.size(1) + tensor_parallel_rank

    def close(self) -> None:
        """Leave together: a rank that ends while another still talks to it brings that one down."""
        dist.barrier()
        dist.destroy_process_group()

    def gather_errors(self, error: str | None) -> list[str]:
        """Every rank's error, in rank order, empty where all went well. Every rank must call it."""
        return [text for text in self.gather(error) if text is not None]

    def gather(self, own: T) -> list[T]:
        """What every rank has given, in rank order. Every rank must call it."""
        everybody: list[T] = [own] * self.world_size
        dist.all_gather_object(everybody, own)
        return everybody


def open_topology(
    tensor_parallel_size: int,
    device: str,
    environment: Mapping[str, str] = os.environ,
    num_threads: int | None = None,
    *,
    pipeline_parallel_size: int = 1,
    patience: timedelta = PATIENCE,
) -> Topology:
    """Join the ranks that torchrun started (or be the only one) and give this rank its device and threads.

    Raises:
        TopologyError: torchrun started another number of ranks than the two sizes need, or there is no such device.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    if world_size != tensor_parallel_size * pipeline_parallel_size:
        raise TopologyError(_wrong_number_of_ranks(tensor_parallel_size, pipeline_parallel_size, world_size))
    chosen = _choose_device(device, int(environment.get("LOCAL_RANK", "0")))
    local_world_size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    num_threads = num_threads or max(1, len(os.sched_getaffinity(0)) // local_world_size)
    if chosen.type == "cpu":
        torch.set_num_threads(num_threads)
    if not dist.is_initialized():
        _join(int(environment.get("RANK", "0")), world_size, chosen, environment)
    shape = (pipeline_parallel_size, tensor_parallel_size)
    mesh = init_device_mesh(chosen.type, shape, mesh_dim_names=("pp", "tp"))
    group = open_tensor_parallel(mesh, patience)
    return Topology(dist.get_rank(), world_size, chosen, mesh, group, num_threads, patience)


def open_tensor_parallel(mesh: DeviceMesh, patience: timedelta = PATIENCE) -> TensorParallelGroup:
    """This rank's group along the mesh's axis `tp`. Every rank of the mesh calls it."""
    group = mesh.get_group("tp")
    size = dist.get_world_size(group)
    team = open_team(group, patience) if size > 1 and mesh.device_type == "cpu" else None
    return TensorParallelGroup(mesh.get_local_rank("tp"), size, group, team)


def _wrong_number_of_ranks(tensor_parallel_size: int, pipeline_parallel_size: int, world_size: int) -> str:
    if pipeline_parallel_size == 1:
        return (
            f"tensor_parallel_size {tensor_parallel_size} needs {tensor_parallel_size} ranks, torchrun started "
            f"{world_size}: set torchrun.nproc-per-node and handler.tensor_parallel_size to the same number"
        )
    return (
        f"tensor_parallel_size {tensor_parallel_size} × pipeline_parallel_size {pipeline_parallel_size} needs "
        f"{tensor_parallel_size * pipeline_parallel_size} ranks, torchrun started {world_size}: set "
        "torchrun.nproc-per-node and handler.tensor_parallel_size/pipeline_parallel_size to match"
    )


def _choose_device(device: str, local_rank: int) -> torch.device:
    num_gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise TopologyError(f"rank {local_rank} needs a GPU of its own, this machine shows {num_gpus}: set device: cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(rank: int, world_size: int, device: torch.device, environment: Mapping[str, str]) -> None:
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if world_size == 1:  # no torchrun, no port: a store in this process's own memory
        store: Store = HashStore()
    elif environment.get(_SHARES_ITS_STORE) == "False" and environment.get("LOCAL_WORLD_SIZE") == str(world_size):
        store = _store_on_loopback(rank, world_size, int(environment["MASTER_PORT"]))
    else:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        return
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)


def _store_on_loopback(rank: int, world_size: int, port: int) -> TCPStore:
    """For ranks of one host. A store that torch makes listens on all of the host's addresses, and asks nobody for a
    key."""
    listener: int | None = None
    if rank == 0:
        with socket.socket() as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind(("127.0.0.1", port))
            own.listen()
            listener = own.detach()
    return TCPStore(
        "127.0.0.1", port, world_size, is_master=rank == 0, timeout=COLLECTIVE_TIMEOUT, master_listen_fd=listener
    )
