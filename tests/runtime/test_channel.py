"""Plans reach the ranks that follow as they were sent, and go nowhere where there is one rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from ts_parallel.runtime.channel import StepChannel
from ts_parallel.runtime.step import StepPlan

SCRIPT = Path(__file__).parents[1] / "ranks" / "channel.py"


@pytest.mark.ranks
def test_short_and_long_plans_arrive_as_they_were_sent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert "rank 1 received 7 plans" in result.stdout


def test_single_rank_sends_to_nobody_and_joins_nothing() -> None:
    was_initialized = dist.is_initialized()
    StepChannel(world_size=1).send(StepPlan(is_last=True))
    assert dist.is_initialized() == was_initialized
