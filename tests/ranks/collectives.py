"""Run by torchrun: `collectives.py shared|gloo`. What each of two or four ranks must get from the collectives.

Of four, the first two and the first three are groups of their own too.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ts_parallel import shared_memory
from ts_parallel.topology import TensorParallelGroup, Topology, open_topology

PIECE = 256 * 1024  # bytes that a rank puts into shared memory at once
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 7, 63, 768, 4099, PIECE // 4, PIECE // 2, PIECE // 2 + 1, 3 * PIECE + 5)


def check_places(topology: Topology) -> None:
    rank = int(os.environ["RANK"])
    group = topology.tensor_parallel
    size = int(os.environ["WORLD_SIZE"])
    assert (topology.rank, topology.world_size, topology.device.type) == (rank, size, "cpu")
    assert (group.rank, group.size) == (rank, size)
    assert topology.mesh.mesh_dim_names == ("pp", "tp") and topology.mesh.shape == (1, size)


def check_all_reduce(group: TensorParallelGroup) -> None:
    tensor = torch.arange(6.0).view(2, 3) * (group.rank + 1)
    assert group.all_reduce(tensor) is tensor
    assert torch.equal(tensor, torch.arange(6.0).view(2, 3) * sum(range(group.size + 1)))


def parts_of(size: int, num_elements: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What each rank brings: of many magnitudes, with what is smaller than normal, infinite or no number between."""
    generator = torch.Generator().manual_seed(num_elements)
    parts = torch.randn(size, num_elements, generator=generator)
    parts *= 10.0 ** torch.randint(-7, 4, (num_elements,), generator=generator)
    if num_elements > 100:
        parts[:, :6] = torch.tensor([0.0, -0.0, 1e-40, 6e-8, 65504.0, 3.3e38])
        parts[0, 6:10] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.inf])
        parts[-1, 9] = -torch.inf
    return list(parts.to(dtype))


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit by bit; any number that is none is like any other."""
    numbers = torch.int32 if one.element_size() == 4 else torch.int16
    is_none = one.isnan() & other.isnan()
    return bool(((one.view(numbers) == other.view(numbers)) | is_none).all())


def check_sums(group: TensorParallelGroup, others: dist.ProcessGroup) -> None:
    """Of every size and type: added in float32 in the order of the ranks, and of two ranks as gloo adds them."""
    assert group.team is not None
    for dtype in DTYPES:
        for num_elements in SIZES:
            parts = parts_of(group.size, num_elements, dtype)
            expected = parts[0].float().clone()
            for part in parts[1:]:
                expected += part
            tensor = parts[group.rank].clone()
            group.all_reduce(tensor)
            assert is_same(tensor, expected.to(dtype)), (group.size, dtype, num_elements)
            if group.size == 2:
                dist.all_reduce(parts[group.rank], group=others)
                assert is_same(tensor, parts[group.rank]), (dtype, num_elements)
    table = torch.arange(12.0).view(3, 4) * (group.rank + 1)
    assert (
        group.all_reduce(table.t()[1:]).tolist()
        == (torch.arange(12.0).view(3, 4).t()[1:] * sum(range(group.size + 1))).tolist()
    )
    assert table[0, 0] == 0 and table[0, 1] == sum(range(group.size + 1))  # what was given is what was summed
    assert group.all_reduce(torch.empty(0, 5)).shape == (0, 5)
    counts = torch.tensor([group.rank, 2**60])  # no type for shared memory
    assert group.all_reduce(counts).tolist() == [sum(range(group.size)), 2**60 * group.size]


def check_gather(group: TensorParallelGroup, num_rows: int, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """On every rank, and on the first one only; a few of them, of which nobody waits for the first."""
    whole = (torch.arange(num_rows * sum(sizes)) % 251).to(dtype).view(num_rows, sum(sizes))
    part = whole.narrow(1, sum(sizes[: group.rank]), sizes[group.rank])
    for shift in range(3):
        gathered = group.all_gather(part + shift, sizes)
        assert torch.equal(gathered, whole + shift) and gathered.dtype == dtype, gathered
        alone = group.gather(part - shift, sizes)
        assert (alone is None) == (group.rank > 0)
        assert alone is None or (torch.equal(alone, whole - shift) and alone.dtype == dtype), alone


def check_gathers(group: TensorParallelGroup) -> None:
    uneven = [5, 2, 4, 1][: group.size]
    for sizes in (uneven, uneven[::-1], [4] * group.size, [6, *[0] * (group.size - 1)]):
        for dtype in (*DTYPES, torch.int64):
            check_gather(group, 3, tuple(sizes), dtype)
    check_gather(group, 0, tuple(uneven), torch.float32)
    check_gather(group, 5, (30011, *[29989] * (group.size - 1)), torch.float32)  # several pieces, cut within rows


def check_that_nothing_is_left() -> None:
    assert not [path for path in Path("/dev/shm").glob("*") if "ts_parallel" in path.name]


def check_part_of_the_ranks(size: int) -> None:
    """Ranks that share memory with some of their host only."""
    process_group = dist.new_group(list(range(size)))
    if dist.get_rank() < size:
        team = shared_memory.open_team(process_group, timedelta(seconds=60))
        group = TensorParallelGroup(dist.get_rank(process_group), size, process_group, team)
        check_sums(group, process_group)
        check_gathers(group)


def check_gather_errors(topology: Topology) -> None:
    everybody = [f"rank {rank} is unwell" for rank in range(topology.world_size)]
    one = everybody[topology.rank]
    assert topology.gather_errors(None) == []
    assert topology.gather_errors(one if topology.rank == 1 else None) == ["rank 1 is unwell"]
    assert topology.gather_errors(one) == everybody


def main(way: str) -> None:
    if way == "gloo":
        shared_memory.native = None  # type: ignore[assignment]
    num_ranks = int(os.environ["WORLD_SIZE"])
    topology = open_topology(num_ranks, "cpu", num_threads=1)
    check_places(topology)
    check_all_reduce(topology.tensor_parallel)
    check_gathers(topology.tensor_parallel)
    assert (topology.tensor_parallel.team is not None) == (way == "shared")
    if way == "shared":
        check_sums(topology.tensor_parallel, topology.mesh.get_group("tp"))
        check_that_nothing_is_left()
    if num_ranks == 4:
        for size in (2, 3):
            check_part_of_the_ranks(size)
    check_gather_errors(topology)
    topology.close()
    assert not dist.is_initialized()


if __name__ == "__main__":
    main(sys.argv[1])
