"""Generate without TorchServe: the same engine, in a plain Python program.

python examples/offline.py                                 one process
torchrun --nproc-per-node 2 examples/offline.py            two ranks that share every layer
torchrun --nproc-per-node 2 examples/offline.py --pipeline-parallel-size 2
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ts_parallel import GenerationParams, SamplingParams, TSParallelError, num_ranks_started, open_model

DEMO_MODEL = Path(__file__).parent / "demo_model"
PROMPTS = ["Return a new list containing", "Open the file", "This module provides"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="folder of a checkpoint")
    parser.add_argument("--pipeline-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    arguments = parser.parse_args()

    params = GenerationParams(arguments.max_tokens, SamplingParams(temperature=arguments.temperature))
    sizes = {
        "tensor_parallel_size": num_ranks_started() // arguments.pipeline_parallel_size,
        "pipeline_parallel_size": arguments.pipeline_parallel_size,
    }
    with open_model(arguments.model, dtype=arguments.dtype, **sizes) as model:  # on every rank
        answers = model.generate(arguments.prompts, params)  # on rank 0; the others have none
        if arguments.json and answers:
            print(json.dumps([answer.text for answer in answers]))
            return
        for prompt, answer in zip(arguments.prompts, answers, strict=model.is_leader):
            print(f"{prompt}\033[1m{answer.text}\033[0m  [{len(answer.token_ids)} tokens, {answer.finish_reason}]")


if __name__ == "__main__":
    try:
        main()
    except TSParallelError as error:
        sys.exit(f"offline: {error}")
