"""Ranks of which some have more heads than others: `uneven_heads.py REPORT TP FOLDER…`, each with a `task.json`.

For each folder rank 0 writes, as JSON, every rank's number of blocks, the greedy float32 tokens of its prompts, asked
twice with memory for few of them, how often a request was preempted or found its prompt's beginning computed; and the
bfloat16 logits of the longest prompt, in two chunks and then a token at a time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ts_parallel.config import HandlerConfig, parse_config
from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.causal_lm import make_runner
from ts_parallel.step_plan import Chunk, StepPlan
from ts_parallel.topology import Topology, open_topology

NUM_BLOCKS, BLOCK_SIZE = 16, 4  # enough for one request
PREFILLED = 20


def tokens(runner: Runner, task: dict[str, Any]) -> dict[str, Any]:
    blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    scheduler = Scheduler(blocks, max_num_seqs=4, max_num_batched_tokens=16, num_stages=runner.num_stages)
    engine = Engine(runner, scheduler)
    turns = []
    for turn in range(2):
        prompts = enumerate(task["prompts"])
        turns.append(
            engine.generate([Request(f"{turn}-{at}", tuple(prompt), task["max_tokens"]) for at, prompt in prompts])
        )
    stats = engine.figures().stats
    return {"turns": turns, "hits": stats.num_prefix_hits, "preemptions": stats.num_preemptions}


def logits(runner: Runner, task: dict[str, Any]) -> list[list[float]]:
    prompt: tuple[int, ...] = max(map(tuple, task["prompts"]), key=len)
    bounds = [(0, 7), (7, PREFILLED), *((at, at + 1) for at in range(PREFILLED, len(prompt)))]
    blocks = tuple(reversed(range(-(-len(prompt) // BLOCK_SIZE))))
    found = []
    for start, end in bounds:
        found += runner.logits(StepPlan((Chunk("", prompt[start:end], start, blocks, is_sampled=True),))).tolist()
    return found[1:]


def answer(folder: Path, topology: Topology, tp: int) -> dict[str, Any]:
    task = json.loads((folder / "task.json").read_text())
    section = {"model_path": str(folder), "device": "cpu", "block_size": BLOCK_SIZE, "max_model_len": 64}
    report: dict[str, Any] = {}
    for dtype, ask in (("float32", tokens), ("bfloat16", logits)):
        config = parse_config({**section, "dtype": dtype, "tensor_parallel_size": tp, "kv_cache_memory": "1MiB"})
        assert isinstance(config, HandlerConfig)
        runner = make_runner(config, folder, topology)
        num_blocks = topology.gather(runner.num_blocks)
        if topology.rank:
            runner.follow()
            continue
        report[dtype] = {"num_blocks": num_blocks, "answer": ask(runner, task)}
        runner.stop_followers()
    return report


def main(report: Path, tp: int, folders: list[Path]) -> None:
    topology = open_topology(tp, "cpu", num_threads=1)
    found = {folder.name: answer(folder, topology, tp) for folder in folders}
    if topology.rank == 0:
        report.write_text(json.dumps(found))
    topology.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
