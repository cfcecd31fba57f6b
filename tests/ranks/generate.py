"""Ranks that answer the same prompts with one model after another: `generate.py REPORT SHAPE… -- FOLDER…`.

A shape is `TPxPP`; all have as many ranks. Rank 0 writes the token ids of each shape's and folder's answers as JSON, or
in their place the line that refuses the model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from ts_parallel.config import parse_config
from ts_parallel.engine.request import Request
from ts_parallel.errors import StartupError
from ts_parallel.partition.prepared import CACHE_VARIABLE
from ts_parallel.serving.causal_lm import make_engine, make_runner
from ts_parallel.topology import Topology, open_topology


def answers(folder: Path, topology: Topology, settings: dict[str, int]) -> list[list[int]] | str | None:
    """What rank 0 has generated for all prompts at once; steps are small enough that some prompts come in parts."""
    task = json.loads((folder / "task.json").read_text())
    section = {"model_path": str(folder), "dtype": "float32", "device": "cpu", **settings, **task["settings"]}
    config = parse_config({**section, "max_num_batched_tokens": 48, "kv_cache_memory": "16MiB"})
    os.environ[CACHE_VARIABLE] = f"{folder}-programs"
    try:
        runner = make_runner(config, folder, topology)
    except StartupError as error:  # of all ranks
        return str(error)
    if topology.rank:
        runner.follow()
        return None
    requests = [Request(str(index), tuple(prompt), task["max_tokens"]) for index, prompt in enumerate(task["prompts"])]
    outputs = make_engine(runner, config).generate(requests)
    runner.stop_followers()
    return outputs


def main(report: Path, shapes: list[str], folders: list[Path]) -> None:
    outputs: dict[str, dict[str, list[list[int]] | str | None]] = {}
    for shape in shapes:
        tp, pp = map(int, shape.split("x"))
        topology = open_topology(tp, "cpu", num_threads=1, pipeline_parallel_size=pp)
        settings = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
        outputs[shape] = {folder.name: answers(folder, topology, settings) for folder in folders}
    if topology.rank == 0:
        report.write_text(json.dumps(outputs))
    topology.close()


if __name__ == "__main__":
    end = sys.argv.index("--")
    main(Path(sys.argv[1]), sys.argv[2:end], [Path(name) for name in sys.argv[end + 1 :]])
