"""Ranks that answer one request in much company: `invariance.py REPORT TPxPP FOLDER SETTINGS…`, each JSON of keys of a
`handler:` section.

Rank 0 writes, for each SETTINGS, how the request fared → the numbers of its answer: each token, its log-probability and
those of the most likely ones, in float64, which are as good as the bits of its logits.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from ts_parallel.config import HandlerConfig, parse_config
from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler, TokenOutput
from ts_parallel.runtime.runner import Runner
from ts_parallel.serving.causal_lm import make_runner
from ts_parallel.step_plan import SamplingParams
from ts_parallel.topology import open_topology

WATCHED = "watched"
VOCABULARY = 97
PROMPT_LENGTH, MAX_TOKENS = 45, 12

Numbers = list[list[float]]


def request(name: str, seed: int, length: int, begins: Sequence[int] = ()) -> Request:
    numbers = random.Random(seed)
    prompt = (*begins, *(numbers.randrange(VOCABULARY) for _ in range(length - len(begins))))
    return Request(name, prompt, MAX_TOKENS, SamplingParams(num_logprobs=5))


def watched() -> Request:
    return request(WATCHED, 0, PROMPT_LENGTH)


def others(count: int) -> list[Request]:
    return [request(f"other {number}", number, 3 + number * 7 % 60) for number in range(1, count + 1)]


class Answers:
    """A scheduler over the runner, with blocks of its own."""

    def __init__(self, runner: Runner, *, num_blocks: int | None = None, max_num_batched_tokens: int = 512) -> None:
        blocks = BlockManager(num_blocks or runner.num_blocks, runner.block_size)
        sizes = {"max_num_seqs": 32, "max_num_batched_tokens": max_num_batched_tokens}
        self._scheduler = Scheduler(blocks, num_stages=runner.num_stages, **sizes)
        self._engine = Engine(runner, self._scheduler)

    @property
    def num_preemptions(self) -> int:
        return self._scheduler._stats.num_preemptions

    def __call__(self, requests: list[Request]) -> Numbers:
        numbers: Numbers = []

        def deliver(outputs: list[TokenOutput]) -> None:
            for output in outputs:
                if output.request_id == WATCHED:
                    assert output.logprobs is not None
                    top = [number for pair in output.logprobs.top for number in pair]
                    numbers.append([output.token_id, output.logprobs.logprob, *top])

        for each in requests:
            self._engine.add(each)
        while self._engine.has_requests:
            self._engine.step(deliver=deliver)
        assert len(numbers) == MAX_TOKENS * any(each.request_id == WATCHED for each in requests)
        return numbers


def fare(runner: Runner) -> dict[str, Numbers]:
    """How the watched request fares in each company."""
    after_another, same_prefix = Answers(runner), watched()
    after_another([request("first", 9, PROMPT_LENGTH, watched().prompt_ids[:40])])
    found = {"from the prefix cache": after_another([same_prefix])}  # before others write over the same memory
    few = Answers(runner, num_blocks=9)
    found |= {
        "alone": Answers(runner)([watched()]),
        "among 31 others": Answers(runner)([*others(20), watched(), *others(31)[20:]]),
        "in chunks": Answers(runner, max_num_batched_tokens=7)([watched(), *others(2)]),
        "preempted": few([*others(4), watched()]),
    }
    assert few.num_preemptions and same_prefix.num_cached
    return found


def main(report: Path, tp: int, pp: int, folder: Path, settings: list[str]) -> None:
    topology = open_topology(tp, "cpu", num_threads=1, pipeline_parallel_size=pp)
    found = {}
    for own in settings:
        section = {"model_path": str(folder), "device": "cpu", "kv_cache_memory": "16MiB", **json.loads(own)}
        config = parse_config({**section, "tensor_parallel_size": tp, "pipeline_parallel_size": pp})
        assert isinstance(config, HandlerConfig)
        runner = make_runner(config, folder, topology)
        if topology.rank:
            runner.follow()
            continue
        found[own] = fare(runner)
        runner.stop_followers()
    if topology.rank == 0:
        report.write_text(json.dumps(found))
    topology.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2].split("x")), Path(sys.argv[3]), sys.argv[4:])
