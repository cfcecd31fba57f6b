"""What loading costs each rank: `torchrun --nproc-per-node TP·PP peak_memory.py FOLDER TP PP` prints a line a rank.

`peak_mb` is the most memory that the process has had, Python and torch included; `start_mb` what it had before.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ts_parallel.config import HandlerConfig, parse_config
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.causal_lm import load_model
from ts_parallel.topology import Topology, open_topology


def peak_mb() -> float:
    """Of this program alone: getrusage's count goes on from that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def measure(folder: Path, topology: Topology, settings: dict[str, Any]) -> dict[str, float]:
    """As a rank of a server does it."""
    start = peak_mb()
    config = parse_config({"model_path": str(folder), "device": "cpu", "kv_cache_memory": "1MiB", **settings})
    assert isinstance(config, HandlerConfig)
    part, backend = load_model(config, folder, topology)
    own, seconds = part.program.plan.local_bytes(topology.tensor_parallel.rank) / 1e6, part.seconds
    after_loading = peak_mb()
    Runner(part, topology, backend, block_size=16, kv_cache_bytes=2**20, max_model_len=16)
    return {
        "rank": topology.rank,
        "own_mb": round(own, 1),
        "start_mb": round(start, 1),
        "loaded_mb": round(after_loading, 1),
        "peak_mb": round(peak_mb(), 1),
        "seconds": round(seconds, 3),
    }


def main(folder: Path, tp: int, pp: int) -> None:
    topology = open_topology(tp, "cpu", num_threads=1, pipeline_parallel_size=pp)
    settings = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    line = json.dumps(measure(folder, topology, settings))
    os.write(sys.stdout.fileno(), f"{line}\n".encode())  # at once, or the ranks' lines mix
    topology.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
