"""Two processes of this machine that add up by torch.distributed over gloo, as ranks do. Each runs this file:

python -m ts_parallel.cli.doctor.loopback RANK PORT
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from ts_parallel.cli.doctor.finding import Finding, Status
from ts_parallel.cli.server.torchserve import free_ports

_NUM_RANKS = 2
_SECONDS = 60.0  # of both together, the import of torch among them, which takes long where others compute
_ADVICE = "ranks could not talk; set GLOO_SOCKET_IFNAME=lo, or let the host's name resolve to an address of its own"


class Ranks:
    """Owns the processes, which run from the beginning."""

    def __init__(self) -> None:
        port = free_ports(1)[0]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", __name__]
        self._deadline = time.monotonic() + _SECONDS
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), str(port)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(_NUM_RANKS)
        ]

    def finding(self) -> Finding:
        """Waits for both, at most until the deadline."""
        wanted = str(sum(range(1, _NUM_RANKS + 1)))
        for process in self._processes:
            try:
                output, errors = process.communicate(timeout=max(0.1, self._deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return Finding("ranks over gloo", Status.FAIL, f"no sum after {_SECONDS:g} s", _ADVICE)
            if output.strip() != wanted:
                last = (errors.strip().splitlines() or [f"answered {output.strip()!r}"])[-1]
                return Finding("ranks over gloo", Status.FAIL, f"two processes made no sum ({last[:200]})", _ADVICE)
        return Finding("ranks over gloo", Status.OK, f"{_NUM_RANKS} processes on loopback have added up")

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


@contextmanager
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.end()


def add_up(rank: int, port: int) -> float:
    """The sum of 1 + `rank` over both processes."""
    import torch
    import torch.distributed as dist

    place = f"tcp://127.0.0.1:{port}"
    limit = timedelta(seconds=_SECONDS)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=_NUM_RANKS, timeout=limit)
    number = torch.tensor(1.0 + rank)
    dist.all_reduce(number)
    dist.barrier()  # who leaves first would break the other's connection
    dist.destroy_process_group()
    return float(number)


if __name__ == "__main__":
    print(f"{add_up(int(sys.argv[1]), int(sys.argv[2])):.0f}")
