"""What ranks tell each other arrives as it was sent, nobody waits to send, and a rank alone is silent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist
from places import RANKS

from ts_parallel.runtime.channel import StepChannel
from ts_parallel.shared_memory import native
from ts_parallel.step_plan import StepPlan
from ts_parallel.topology import Topology, open_topology

SCRIPT = RANKS / "channel.py"


@pytest.fixture
def alone() -> Iterator[Topology]:
    topology = open_topology(1, "cpu", environment={}, num_threads=1)
    yield topology
    topology.close()


@pytest.mark.ranks
@pytest.mark.parametrize("way", ["shared", "gloo"])
@pytest.mark.parametrize(("num_stages", "tensor_parallel_size"), [(2, 2), (3, 1)])
def test_every_message_arrives_as_it_was_sent(
    tmp_path: Path, num_stages: int, tensor_parallel_size: int, way: str
) -> None:
    if way == "shared" and native is None:
        pytest.skip("ts_parallel.native is not built")
    num_ranks = num_stages * tensor_parallel_size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(SCRIPT), str(num_stages), str(tensor_parallel_size), way],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split("\n")) == ["", *(f"rank {rank} is content" for rank in range(num_ranks))]


def test_single_rank_sends_to_nobody_and_joins_nothing(alone: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> NoReturn:
        raise AssertionError("there is nobody else")

    monkeypatch.setattr(dist, "new_group", refuse)
    monkeypatch.setattr(dist, "isend", refuse)
    channel = StepChannel(alone)
    for _ in range(3):
        channel.send_plan(StepPlan(is_last=True))
    channel.flush()
