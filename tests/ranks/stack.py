"""One of two ranks: `stack.py FOLDER`. Rank 0 compares the logits of sublayers in one call with those of their parts,
one by one, and says what it sees when rank 1 is killed before its first sum in there."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from ts_parallel.config import parse_config
from ts_parallel.native import kernels_for
from ts_parallel.runtime.backends.native import sublayers
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.causal_lm import make_runner
from ts_parallel.step_plan import Chunk, StepPlan
from ts_parallel.topology import open_topology

LENGTHS = (33, 1, 1, 20, 1)


def logits_of(runner: Runner) -> torch.Tensor:
    found, start = [], 0
    blocks = tuple(range(-(-sum(LENGTHS) // runner.block_size)))
    for length in LENGTHS:
        token_ids = tuple(range(3 + start, 3 + start + length))
        found.append(runner.logits(StepPlan((Chunk("", token_ids, start, blocks, is_sampled=True),))))
        start += length
    return torch.cat(found)


def main(folder: Path) -> None:
    topology = open_topology(2, "cpu", num_threads=1)
    section = {"model_path": str(folder), "device": "cpu", "tensor_parallel_size": 2, "kv_cache_memory": "1MiB"}
    config, calls, found = parse_config(section), 0, []
    kernels: Any = kernels_for(getattr(torch, json.loads((folder / "config.json").read_text())["dtype"]))
    run_stack = kernels.run_stack

    def counted(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        run_stack(*arguments)

    for is_whole in (True, False):
        kernels.run_stack = counted
        layer_of = sublayers.layer_of
        if not is_whole:
            sublayers.layer_of = lambda function, dtype: None
        runner = make_runner(config, folder, topology)
        sublayers.layer_of = layer_of
        if topology.rank:
            runner.follow()
        else:
            found.append(logits_of(runner))
            runner.stop_followers()
            assert calls == len(LENGTHS)
    runner = make_runner(config, folder, topology)
    if topology.rank:
        kernels.run_stack = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        runner.follow()
    print("one call for the stack\nthe same bits" if torch.equal(*found) else found)
    try:
        logits_of(runner)
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)  # the process group is of no more use


if __name__ == "__main__":
    main(Path(sys.argv[1]))
