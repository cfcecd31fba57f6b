"""Ranks that answer the same prompts with one model after another: `generate.py REPORT TENSOR_PARALLEL_SIZE FOLDER…`.

Rank 0 writes the token ids of each folder's answers as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ts_parallel.config import parse_config
from ts_parallel.engine.request import Request
from ts_parallel.serving.text_generation import make_engine, make_runner
from ts_parallel.topology import Topology, open_topology


def answers(folder: Path, topology: Topology, prompts: list[list[int]], max_tokens: int) -> list[list[int]] | None:
    """What rank 0 has generated for all prompts at once; steps are small enough that some prompts come in parts."""
    section = {"model_path": str(folder), "tensor_parallel_size": topology.world_size, "dtype": "float32"}
    config = parse_config({**section, "device": "cpu", "max_num_batched_tokens": 48, "kv_cache_memory": "16MiB"})
    runner = make_runner(config, folder, topology)
    if topology.rank:
        runner.follow()
        return None
    requests = [Request(str(index), tuple(prompt), max_tokens) for index, prompt in enumerate(prompts)]
    outputs = make_engine(runner, config).generate(requests)
    runner.stop_followers()
    return outputs


def main(report: Path, size: int, folders: list[Path]) -> None:
    topology = open_topology(size, "cpu", num_threads=1)
    outputs = {}
    for folder in folders:
        task = json.loads((folder / "task.json").read_text())
        outputs[folder.name] = answers(folder, topology, task["prompts"], task["max_tokens"])
    if topology.rank == 0:
        report.write_text(json.dumps(outputs))
    topology.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
