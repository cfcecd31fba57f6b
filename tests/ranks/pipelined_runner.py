"""Run by torchrun: `pipelined_runner.py MODEL REPORT NUM_STAGES TENSOR_PARALLEL_SIZE`.

Rank 0 reports tokens, log-probabilities and logits.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ts_parallel.config import parse_config
from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler, TokenOutput
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving import text_generation
from ts_parallel.step_plan import Chunk, SamplingParams, StepPlan
from ts_parallel.topology import Topology, open_topology

NUM_BLOCKS = 10  # of 8 tokens


def make_runner(folder: Path, topology: Topology) -> Runner:
    section = {"model_path": str(folder), "tensor_parallel_size": topology.tensor_parallel.size, "dtype": "float32"}
    config = parse_config({**section, "device": "cpu", "kv_cache_memory": "16MiB", "block_size": 8})
    return text_generation.make_runner(config, folder, topology)


def requests() -> list[Request]:
    """Nine prompts of 1 to 25 tokens, every other one hot; every third is scored, some with their prompts."""
    generator = torch.Generator().manual_seed(0)
    lengths = range(1, 26, 3)
    prompts = [tuple(torch.randint(2048, (length,), generator=generator).tolist()) for length in lengths]
    # By these seeds no number falls within 1e-4 of where one token ends and the next begins: a rounding decides there.
    samplings = [SamplingParams(1.0, 0.95, 2**64 - 3 - index) if index % 2 else SamplingParams() for index in range(9)]
    samplings[::3] = [replace(sampling, num_logprobs=2) for sampling in samplings[::3]]
    return [
        Request(str(index), prompt, max_tokens=12, sampling=sampling, scores_prompt=index % 6 == 0)
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]


def lead(runner: Runner) -> dict[str, Any]:
    scheduler = Scheduler(
        BlockManager(NUM_BLOCKS, runner.block_size),
        max_num_seqs=6,
        max_num_batched_tokens=12,
        num_stages=runner.num_stages,
    )
    engine = Engine(runner, scheduler)
    engine.sign_of_life()
    outputs: list[TokenOutput] = []
    running = requests()
    for request in running:
        engine.add(request)
    while engine.has_requests:
        engine.step(deliver=outputs.extend)
    outputs.sort(key=lambda output: output.request_id)
    scores = [output.logprobs for output in outputs] + [own for request in running for own in request.prompt_logprobs]
    assert not engine.step()
    engine.sign_of_life()
    chunks = (Chunk("a", (5, 6, 7), 0, (1,), True), Chunk("b", (8, 9), 0, (0,), True), Chunk("c", (3,), 0, (2,), False))
    logits = runner.logits(StepPlan(chunks))
    runner.stop_followers()
    return {
        "tokens": [request.output_ids for request in running],
        "logprobs": [own for score in scores if score for own in (score.logprob, *(value for _, value in score.top))],
        "logits": logits.tolist(),
    }


def main(folder: Path, report: Path, num_stages: int, tensor_parallel_size: int) -> None:
    topology = open_topology(tensor_parallel_size, "cpu", num_threads=1, pipeline_parallel_size=num_stages)
    runner = make_runner(folder, topology)
    if topology.rank == 0:
        report.write_text(json.dumps(lead(runner)))
    else:
        runner.follow()
    topology.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
