"""The logits after one prompt with weights as they are and as integers: `torchrun … quantized_logits.py FOLDER`.

Rank 0 prints a JSON object of them by the weights' `quantization`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ts_parallel.config import parse_config
from ts_parallel.serving.causal_lm import make_runner
from ts_parallel.serving.offline import num_ranks_started
from ts_parallel.step_plan import Chunk, StepPlan
from ts_parallel.topology import open_topology


def main(folder: Path) -> None:
    size = num_ranks_started()
    topology = open_topology(size, "cpu", num_threads=1)
    found = {}
    for quantization in (None, "int8", "int4"):
        section = {"model_path": str(folder), "device": "cpu", "tensor_parallel_size": size, "kv_cache_memory": "1MiB"}
        runner = make_runner(parse_config({**section, "quantization": quantization}), folder, topology)
        if topology.rank:
            runner.follow()
            continue
        prompt = tuple(range(3, 43))
        blocks = tuple(range(-(-len(prompt) // runner.block_size)))
        found[str(quantization)] = runner.logits(StepPlan((Chunk("", prompt, 0, blocks, is_sampled=True),))).tolist()
        runner.stop_followers()
    topology.close()
    if topology.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
