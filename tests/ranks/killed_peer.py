"""One of three ranks: the last is killed while others sum with it and wait for its messages, and say what they see."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from ts_parallel.shared_memory import open_rings
from ts_parallel.topology import COLLECTIVE_TIMEOUT, open_topology


def main() -> None:
    topology = open_topology(3, "cpu", num_threads=1)
    routes = {rank: (2, rank, 2**16) for rank in range(2)}
    group = topology.mesh.get_group("tp")
    rings = open_rings(group, routes, COLLECTIVE_TIMEOUT)
    topology.tensor_parallel.all_reduce(torch.ones(5))
    if topology.rank == 2:
        for ring in rings.values():
            assert ring.send(torch.arange(3.0))
        time.sleep(0.5)  # the others sleep by now
        os.kill(os.getpid(), signal.SIGKILL)
    ring, received = rings[topology.rank], torch.empty(3)
    waits: list[Callable[[], object]] = [lambda: topology.tensor_parallel.all_reduce(torch.ones(5)), ring.wait]
    for number, wait in enumerate(waits):
        started = time.monotonic()
        try:
            wait()
        except RuntimeError as error:
            print(error, flush=True)
        assert time.monotonic() - started < 3
        if number == 0:  # what was sent before the end is not lost
            assert ring.wait() == (12, True)
            ring.take(received)
            assert received.tolist() == [0, 1, 2]
    sys.stdout.flush()
    os._exit(0)  # the process group is of no more use


if __name__ == "__main__":
    main()
