"""What a token of two tensor-parallel ranks takes beside niced programs that want both cores, and without them.

    python examples/benchmarks/parts/beside_others.py

Two ranks, a core each, sum 24 times a token and compute a little before each sum, as 12 layers do; no model. The turns
change: alone, then with a busy loop at nice 19 on every core. Prints the median and the mean of a token's milliseconds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date

import torch
import torch.distributed as dist

from ts_parallel.topology import Topology, open_topology

SUMS_A_TOKEN, WIDTH = 24, 768
BUSY = [sys.executable, "-c", "while True: pass"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=150)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        sys.exit(subprocess.call([*launch, __file__, *sys.argv[1:]], env={**os.environ, "OMP_NUM_THREADS": "1"}))
    topology = open_topology(2, "cpu", num_threads=1)
    alone, beside = list[float](), list[float]()
    for number in range(arguments.rounds):
        for is_beside in (False, True) if number % 2 else (True, False):
            with others(is_beside and topology.rank == 0):
                dist.barrier()
                (beside if is_beside else alone).extend(tokens(topology, arguments.tokens))
                dist.barrier()
    if topology.rank == 0:
        print(f"{date.today()}, {platform.machine()}, {arguments.rounds} rounds of {arguments.tokens} tokens\n")
        print("| | median, ms | mean, ms | 99 of 100 within, ms |")
        print("|---|---|---|---|")
        for name, own in (("alone", alone), ("beside", beside)):
            mean, most = statistics.mean(own), statistics.quantiles(own, n=100)[-1]
            print(f"| {name} | {statistics.median(own):.2f} | {mean:.2f} | {most:.2f} |")
        print(
            f"\n{statistics.median(beside) / statistics.median(alone):.2f} times the median, "
            f"{statistics.mean(beside) / statistics.mean(alone):.2f} times the mean"
        )
    topology.close()


@contextmanager
def others(are_there: bool) -> Iterator[None]:
    """A busy loop on each core while they are."""
    cores = sorted(os.sched_getaffinity(0)) if are_there else []
    loops = [subprocess.Popen(["nice", "-n", "19", "taskset", "-c", str(core), *BUSY]) for core in cores]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def tokens(topology: Topology, number: int) -> list[float]:
    """Milliseconds of each."""
    weight, hidden = torch.ones(WIDTH, WIDTH), torch.ones(WIDTH)
    spent = []
    for _ in range(number):
        started = time.perf_counter()
        for _ in range(SUMS_A_TOKEN):
            topology.tensor_parallel.all_reduce(weight @ hidden)
        spent.append(1e3 * (time.perf_counter() - started))
    return spent


if __name__ == "__main__":
    main()
