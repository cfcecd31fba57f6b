"""What loading costs each rank: `torchrun --nproc-per-node N peak_memory.py FOLDER` prints one line of JSON a rank.

`peak_mb` is the most memory that the process has had, Python and torch included; `start_mb` what it had before.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from ts_parallel.partition.build import build_rank_model
from ts_parallel.topology import Topology, open_topology


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB


def measure(folder: Path, topology: Topology) -> dict[str, float]:
    start = peak_mb()
    part = build_rank_model(folder, "auto", topology.tensor_parallel, topology.device)
    return {
        "rank": topology.rank,
        "shard_mb": round(part.plan.local_bytes(topology.rank) / 1e6, 1),
        "start_mb": round(start, 1),
        "peak_mb": round(peak_mb(), 1),
        "seconds": round(part.seconds, 3),
    }


def main(folder: Path) -> None:
    topology = open_topology(int(os.environ["WORLD_SIZE"]), "cpu")
    print(json.dumps(measure(folder, topology)), flush=True)
    topology.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
