"""One of two ranks stops itself while the other sums with it; that one says how long it waited, and ends both."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import torch

from ts_parallel.serving.torchserve.rank_watch import RankWatch, other_ranks
from ts_parallel.topology import open_topology


def main() -> None:
    topology = open_topology(2, "cpu", num_threads=1, patience=timedelta(seconds=5))
    others = other_ranks(topology)
    assert list(others) == [1 - topology.rank]
    topology.tensor_parallel.all_reduce(torch.ones(5))
    if topology.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        raise AssertionError("nobody lets it go on")
    started = time.monotonic()
    try:
        topology.tensor_parallel.all_reduce(torch.ones(5))
    except RuntimeError as error:
        assert 4.9 < time.monotonic() - started < 30
        assert f"waited 5 s for rank 1 (process {others[1].pid})" in str(error)
    else:
        raise AssertionError("nobody summed with it")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, once the other has ended
    RankWatch(others, 1, lambda: None).end_worker()
    others[1].wait(30)
    print("the stopped rank has ended", flush=True)
    os._exit(0)  # the process group is of no more use


if __name__ == "__main__":
    main()
