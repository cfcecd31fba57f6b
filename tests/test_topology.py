"""Ranks find their places and devices, and talk to each other; alone they are silent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from places import RANKS

from ts_parallel.cli.server.torchserve import free_ports
from ts_parallel.errors import TopologyError
from ts_parallel.shared_memory import native
from ts_parallel.topology import TensorParallelGroup, open_topology


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The process is left as it was: in no group, with its own number of threads."""
    num_threads = torch.get_num_threads()
    assert not dist.is_initialized()
    yield
    torch.set_num_threads(num_threads)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def no_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> NoReturn:
        raise AssertionError("a collective was called")

    monkeypatch.setattr(dist, "all_reduce", refuse)
    monkeypatch.setattr(dist, "all_gather", refuse)


@pytest.mark.parametrize(
    ("environment", "started", "wanted"), [({}, 1, 2), ({"WORLD_SIZE": "2"}, 2, 1), ({"WORLD_SIZE": "4"}, 4, 2)]
)
def test_wrong_number_of_ranks_is_named_with_the_right_one_and_both_keys(
    environment: dict[str, str], started: int, wanted: int
) -> None:
    with pytest.raises(TopologyError) as refusal:
        open_topology(wanted, "cpu", environment)
    message = str(refusal.value)
    assert message.startswith(f"tensor_parallel_size {wanted} needs {wanted} ranks, torchrun started {started}:")
    assert "torchrun.nproc-per-node" in message and "handler.tensor_parallel_size" in message
    assert not dist.is_initialized()


def test_wrong_number_of_ranks_for_several_stages_is_named_with_the_product() -> None:
    with pytest.raises(TopologyError) as refusal:
        open_topology(2, "cpu", {"WORLD_SIZE": "2"}, pipeline_parallel_size=2)
    assert str(refusal.value) == (
        "tensor_parallel_size 2 × pipeline_parallel_size 2 needs 4 ranks, torchrun started 2: set "
        "torchrun.nproc-per-node and handler.tensor_parallel_size/pipeline_parallel_size to match"
    )
    with pytest.raises(TopologyError, match="tensor_parallel_size 1 × pipeline_parallel_size 3 needs 3 ranks"):
        open_topology(1, "cpu", {}, pipeline_parallel_size=3)
    assert not dist.is_initialized()


def test_only_rank_opens_and_closes_twice() -> None:
    for _ in range(2):
        topology = open_topology(1, "cpu", {})
        group = topology.tensor_parallel
        assert (topology.rank, topology.world_size, topology.device) == (0, 1, torch.device("cpu"))
        assert (group.rank, group.size) == (0, 1)
        assert topology.mesh.mesh_dim_names == ("pp", "tp") and topology.mesh.shape == (1, 1)
        assert (topology.stage, topology.num_stages, topology.rank_at(0, 0)) == (0, 1, 0)
        assert topology.gather_errors(None) == []
        assert topology.gather_errors("unwell") == ["unwell"]
        topology.close()
        assert not dist.is_initialized()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_number_of_threads_is_obeyed(num_threads: int) -> None:
    topology = open_topology(1, "cpu", {"LOCAL_WORLD_SIZE": "2"}, num_threads)
    topology.close()
    assert torch.get_num_threads() == topology.num_threads == num_threads


@pytest.mark.parametrize(("num_cores", "num_ranks", "num_threads"), [(6, 1, 6), (6, 2, 3), (5, 2, 2), (2, 4, 1)])
def test_cores_are_divided_among_the_ranks_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, num_cores: int, num_ranks: int, num_threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(num_cores)))
    open_topology(1, "cpu", {"LOCAL_WORLD_SIZE": str(num_ranks)}).close()
    assert torch.get_num_threads() == num_threads


def test_device_is_the_cpu_where_no_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    topology = open_topology(1, "auto", {})
    topology.close()
    assert topology.device == torch.device("cpu")


@pytest.mark.parametrize(("device", "num_gpus", "rank"), [("cuda", 0, 0), ("cuda", 1, 1), ("auto", 2, 3)])
def test_rank_without_a_gpu_of_its_own_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, num_gpus: int, rank: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(TopologyError, match=f"rank {rank} needs a GPU of its own, this machine shows {num_gpus}"):
        open_topology(1, device, {"LOCAL_RANK": str(rank)})
    assert not dist.is_initialized()


@pytest.mark.usefixtures("no_traffic")
@pytest.mark.parametrize("rank", [0, 1])
def test_meta_tensors_get_their_shapes_without_traffic(rank: int) -> None:
    sizes = (5, 3)
    group = TensorParallelGroup(rank, 2)
    part = torch.empty(2, 7, sizes[rank], dtype=torch.bfloat16, device="meta")
    assert group.all_reduce(part) is part
    whole = group.all_gather(part, sizes)
    assert (whole.shape, whole.dtype, whole.is_meta) == ((2, 7, 8), torch.bfloat16, True)


@pytest.mark.usefixtures("no_traffic")
def test_group_of_one_returns_what_it_is_given() -> None:
    tensor = torch.arange(4.0)
    group = TensorParallelGroup(0, 1)
    assert group.all_reduce(tensor) is tensor
    assert group.all_gather(tensor, (4,)) is tensor
    assert torch.equal(tensor, torch.arange(4.0))


@pytest.mark.ranks
@pytest.mark.parametrize(("num_ranks", "way"), [(2, "gloo"), (2, "shared"), (4, "shared")])
def test_ranks_sum_gather_uneven_parts_and_share_their_errors(tmp_path: Path, num_ranks: int, way: str) -> None:
    if way == "shared" and native is None:
        pytest.skip("ts_parallel.native is not built")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(RANKS / "collectives.py"), way], capture_output=True, text=True, timeout=120, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert ("over gloo, not through shared memory" in result.stderr) == (way == "gloo")


@pytest.mark.ranks
def test_ranks_notice_within_seconds_that_another_one_was_killed() -> None:
    """Those that sum, and those that wait for a plan, and nothing is left of their memory."""
    if native is None:
        pytest.skip("ts_parallel.native is not built")
    port = str(free_ports(1)[0])
    environment = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(RANKS / "killed_peer.py")]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    try:
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    victim = f"rank 2 (process {ranks[2].pid}) has ended, and this rank waited for it"
    assert ranks[2].returncode == -9
    assert outputs[:2] == [f"{victim}\n{victim}\n"] * 2
    assert not [path for path in Path("/dev/shm").glob("*") if "ts_parallel" in path.name]
