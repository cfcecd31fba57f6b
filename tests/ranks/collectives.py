"""What each of two ranks must get from the collectives; `tests/test_topology.py` starts it under torchrun."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from ts_parallel.topology import TensorParallelGroup, Topology, open_topology


def check_places(topology: Topology) -> None:
    rank = int(os.environ["RANK"])
    group = topology.tensor_parallel
    assert (topology.rank, topology.world_size, topology.device.type) == (rank, 2, "cpu")
    assert (group.rank, group.size) == (rank, 2)
    assert topology.mesh.mesh_dim_names == ("pp", "tp") and topology.mesh.shape == (1, 2)


def check_all_reduce(group: TensorParallelGroup) -> None:
    tensor = torch.arange(6.0).view(2, 3) * (group.rank + 1)
    assert group.all_reduce(tensor) is tensor
    assert torch.equal(tensor, torch.arange(6.0).view(2, 3) * 3)


def check_all_gather(group: TensorParallelGroup, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    whole = torch.arange(3 * sum(sizes), dtype=dtype).view(3, sum(sizes))
    part = whole.narrow(1, group.rank * sizes[0], sizes[group.rank])
    gathered = group.all_gather(part, sizes)
    assert torch.equal(gathered, whole) and gathered.dtype == dtype, gathered


def check_gather_errors(topology: Topology) -> None:
    one = f"rank {topology.rank} is unwell"
    assert topology.gather_errors(None) == []
    assert topology.gather_errors(one if topology.rank == 1 else None) == ["rank 1 is unwell"]
    assert topology.gather_errors(one) == ["rank 0 is unwell", "rank 1 is unwell"]


def main() -> None:
    topology = open_topology(2, "cpu")
    check_places(topology)
    check_all_reduce(topology.tensor_parallel)
    for sizes in [(4, 4), (5, 2), (2, 5), (6, 0)]:
        check_all_gather(topology.tensor_parallel, sizes, torch.float32)
        check_all_gather(topology.tensor_parallel, sizes, torch.bfloat16)
    check_gather_errors(topology)
    topology.close()
    assert not dist.is_initialized()


if __name__ == "__main__":
    main()
