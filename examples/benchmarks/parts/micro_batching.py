"""What micro-batches gain, and what the pipeline's bubble costs; prints two Markdown tables.

    python examples/benchmarks/parts/micro_batching.py

The first table needs a processor that is otherwise idle. In the second the stages only sleep, so that more ranks than
cores can be looked at: what it shows is the schedule and the traffic, not the arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from tempfile import TemporaryDirectory

import torch
from transformers import BertConfig, BertModel

from ts_parallel.partition.program import Crossing
from ts_parallel.runtime.batch.batch_runner import BatchRunner
from ts_parallel.runtime.channel import StepChannel
from ts_parallel.serving.batch.micro_batching import MicroBatcher
from ts_parallel.topology import Topology, open_topology

NUM_ITEMS = 32
NUM_TOKENS = 16
SECONDS_OF_PREPROCESSING = 0.02
ROUNDS = 5
SECONDS_OF_A_MICRO_BATCH = 0.6  # on each rank, over all its stages; long beside what a message takes
BUBBLE_ROUNDS = 3
PIPELINE_SIZES = (2, 4)
NUM_MICRO_BATCHES = (4, 8, 16)
LAPS = (1, 2)

OUTPUT = Crossing("x", torch.float32, ("x[0]", "x[1]"))
Inputs = Mapping[str, torch.Tensor]


class Encoder:
    """A whole encoder of all-MiniLM-L6-v2's size with random weights, as one stage."""

    inputs = ("input_ids",)
    received: Sequence[Crossing] = ()
    sent = (Crossing("vectors", torch.float32, ("input_ids[0]", 384)),)

    def __init__(self) -> None:
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        self._model = BertModel(BertConfig(**sizes)).eval()

    def __call__(self, step: None, inputs: Inputs, received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self._model(inputs["input_ids"]).last_hidden_state.mean(dim=1)]


def preprocess(item: int) -> Inputs:
    time.sleep(SECONDS_OF_PREPROCESSING)
    return {"input_ids": torch.full((NUM_TOKENS,), item)}


def one_after_another(runner: BatchRunner) -> None:
    """Without micro-batching: item by item, then one batch."""
    batch = torch.stack([preprocess(item)["input_ids"] for item in range(NUM_ITEMS)])
    (output,) = runner.run([{"input_ids": batch}])
    output.tolist()


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def report_micro_batching() -> None:
    topology = open_topology(1, "cpu", {}, num_threads=1)
    stage = Encoder()
    runner = BatchRunner([stage], StepChannel(topology), topology, [stage.inputs], stage.sent[0])
    batchers = {
        (num_threads, size): MicroBatcher(runner, preprocess, lambda _, row: row.tolist(), size, num_threads)
        for num_threads, size in ((1, 8), (2, 16), (2, 8), (2, 4), (4, 8))
    }
    plain: list[float] = []
    batched: dict[tuple[int, int], list[float]] = {key: [] for key in batchers}
    for _ in range(1 + ROUNDS):  # all of them in each round, so that they share whatever else the machine does
        plain.append(seconds_of(lambda: one_after_another(runner)))
        for key, batcher in batchers.items():
            batched[key].append(seconds_of(lambda batcher=batcher: batcher.run(range(NUM_ITEMS))))  # type: ignore[misc]
    print(
        f"{NUM_ITEMS} items of {NUM_TOKENS} tokens, {SECONDS_OF_PREPROCESSING * 1e3:.0f} ms of preprocessing each, "
        f"encoder of MiniLM's size on one CPU thread, {ROUNDS} rounds\n"
    )
    print("| preprocess threads | micro_batch_size | items/s | ratio |")
    print("|---|---|---|---|")
    rate = NUM_ITEMS / statistics.median(plain[1:])  # the first round warms up
    print(f"| one after another | one batch of {NUM_ITEMS} | {rate:.1f} | 1.00 |")
    for (num_threads, size), seconds in batched.items():
        median = statistics.median(seconds[1:])
        print(f"| {num_threads} | {size} | {NUM_ITEMS / median:.1f} | {NUM_ITEMS / median / rate:.2f} |")
        batchers[num_threads, size].close()
    topology.close()


@dataclass
class Sleep:
    """A stage that does nothing but take its time, and says how long it took."""

    seconds: float
    seconds_busy: float = 0.0
    inputs: tuple[str, ...] = ()
    received: tuple[Crossing, ...] = (OUTPUT,)
    sent: tuple[Crossing, ...] = (OUTPUT,)

    def __call__(self, step: None, inputs: Inputs, received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.seconds_busy += seconds_of(lambda: time.sleep(self.seconds))
        return [inputs["x"] if self.inputs else received[0]]


def measure_bubbles(topology: Topology) -> list[tuple[int, int, float]]:
    """Laps, micro-batches and the part of the time in which rank 0 has nothing to do, the median of some rounds.

    Every rank must call it.
    """
    bubbles = []
    for num_laps in LAPS:
        seconds = SECONDS_OF_A_MICRO_BATCH / num_laps
        stages = [Sleep(seconds) for _ in range(num_laps)]
        if topology.stage == 0:
            stages[0] = Sleep(seconds, inputs=("x",), received=())
        inputs = [("x",), *[()] * (topology.num_stages * num_laps - 1)]
        runner = BatchRunner(stages, StepChannel(topology), topology, inputs, OUTPUT)
        if topology.rank:
            runner.follow()
            continue
        list(runner.run([{"x": torch.zeros(8, 384)}]))  # the first message between two ranks connects them
        for count in NUM_MICRO_BATCHES:
            rounds = [bubble_of(runner, stages, count) for _ in range(BUBBLE_ROUNDS)]
            bubbles.append((num_laps, count, statistics.median(rounds)))
        runner.stop_followers()
    return bubbles


def bubble_of(runner: BatchRunner, stages: Sequence[Sleep], count: int) -> float:
    busy_before = sum(stage.seconds_busy for stage in stages)
    seconds = seconds_of(lambda: list(runner.run([{"x": torch.zeros(8, 384)}] * count)))
    return 1 - (sum(stage.seconds_busy for stage in stages) - busy_before) / seconds


def report_bubbles() -> None:
    sleep = f"{SECONDS_OF_A_MICRO_BATCH * 1e3:.0f} ms a micro-batch and rank"
    print(f"\nStages that sleep {sleep}; medians of {BUBBLE_ROUNDS} rounds\n")
    print("| p ranks | v stages each | m micro-batches | bubble | (p − 1) / (v·m + p − 1) | off by |")
    print("|---|---|---|---|---|---|")
    for size in PIPELINE_SIZES:
        for num_laps, count, bubble in bubbles_of(size):
            expected = (size - 1) / (num_laps * count + size - 1)
            print(
                f"| {size} | {num_laps} | {count} | {bubble:.1%} | {expected:.1%} | {bubble / expected - 1:+.1%} |",
                flush=True,
            )


def bubbles_of(pipeline_parallel_size: int) -> list[tuple[int, int, float]]:
    """`measure_bubbles` in ranks of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(pipeline_parallel_size), __file__, "--as-rank"]
    with TemporaryDirectory(prefix="ts-parallel-") as scratch:  # torchrun leaves a log folder in it
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": scratch}
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return [(num_laps, count, bubble) for num_laps, count, bubble in json.loads(result.stdout)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().as_rank:
        size = int(os.environ["WORLD_SIZE"])
        topology = open_topology(1, "cpu", num_threads=1, pipeline_parallel_size=size)
        bubbles = measure_bubbles(topology)
        if topology.rank == 0:
            print(json.dumps(bubbles))
        topology.close()
        return
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, medians\n")
    report_micro_batching()
    report_bubbles()


if __name__ == "__main__":
    main()
