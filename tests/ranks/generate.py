"""Ranks that answer the same prompts with one model after another: `generate.py REPORT TP PP FOLDER…`.

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


def answers(
    folder: Path, topology: Topology, settings: dict[str, int], prompts: list[list[int]], max_tokens: int
) -> list[list[int]] | None:
    """What rank 0 has generated for all prompts at once; steps are small enough that some prompts come in parts."""
    section = {"model_path": str(folder), "dtype": "float32", "device": "cpu", **settings}
    config = parse_config({**section, "max_num_batched_tokens": 48, "kv_cache_memory": "16MiB"})
    runner = make_runner(config, folder, topology)
    if topology.rank:
        runner.follow()
        return None
    requests = [Request(str(index), tuple(prompt), max_tokens) for index, prompt in enumerate(prompts)]
    outputs = make_engine(runner, config).generate(requests)
    runner.stop_followers()
    return outputs


def main(report: Path, tp: int, pp: int, folders: list[Path]) -> None:
    topology = open_topology(tp, "cpu", num_threads=1, pipeline_parallel_size=pp)
    settings = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    outputs = {}
    for folder in folders:
        task = json.loads((folder / "task.json").read_text())
        outputs[folder.name] = answers(folder, topology, settings, task["prompts"], task["max_tokens"])
    if topology.rank == 0:
        report.write_text(json.dumps(outputs))
    topology.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
