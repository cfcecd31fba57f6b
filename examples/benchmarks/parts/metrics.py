"""What counting and reporting costs beside a decode step: of one step, and of one second's report to TorchServe.

    python examples/benchmarks/parts/metrics.py               32 requests, beside a step of the 125M-parameter model
    python examples/benchmarks/parts/metrics.py --step-ms 20  … beside a step that takes so long

The engine's thread counts in each step, and a thread of its own reports once a second; both are timed here as they run
in a worker, the reports into a file in place of the worker's standard output.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from ts_parallel.engine.request import Request
from ts_parallel.engine.stats import EngineStats, Figures, KVBlocks, Occupancy
from ts_parallel.serving.torchserve.metrics import MetricsReporter, torchserve_meters

LABELS = (("model_name", "m"), ("engine", "9000"))
NUM_ROUNDS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--step-ms", type=float, help="default: it is measured")
    arguments = parser.parse_args()
    count = arguments.sequences
    step = arguments.step_ms / 1e3 if arguments.step_ms else measured_step(count)
    stats = EngineStats()
    counting = seconds_to_count(stats, count)
    with TemporaryDirectory(prefix="ts-parallel-benchmark-") as folder:
        reporting, num_lines = seconds_to_report(stats, count, Path(folder))
    part = (counting + reporting * step) / step  # a second has 1 / step steps and one report
    print(f"{date.today()}, {platform.machine()}, {count} sequences, medians\n")
    print(f"a decode step            {step * 1e3:9.3f} ms")
    print(f"counting, each step      {counting * 1e3:9.3f} ms  {counting / step:.3%} of it")
    print(f"a report, each second    {reporting * 1e3:9.3f} ms  {reporting:.3%} of a second, {num_lines} lines")
    print(f"together                 {part:19.3%} of a step")


def seconds_to_count(stats: EngineStats, count: int) -> float:
    """For one step in which each of `count` requests gets a token, and one of them ends and another comes."""
    requests = [Request(str(number), (1,) * 128, 64) for number in range(count)]

    def step() -> None:
        now = time.perf_counter()
        for request in requests:
            stats.token(request, now)
        stats.ended(requests[0], "length")
        requests[0] = Request("next", (1,) * 128, 64)
        stats.admitted(requests[0], 0)

    return median_seconds(step)


def seconds_to_report(stats: EngineStats, count: int, folder: Path) -> tuple[float, int]:
    """For one report after one second's work, and its lines."""
    metrics_file = folder / "metrics.yaml"
    metrics_file.write_text("model_metrics: {}")
    with (folder / "stdout").open("w") as file:
        logger = logging.getLogger("ts.metrics.caching_metric")
        logger.addHandler(logging.StreamHandler(file))  # flushes each line, as a worker's does
        logger.setLevel(logging.INFO)
        logger.propagate = False
        meters = torchserve_meters(MetricsCacheYamlImpl(str(metrics_file)))
        blocks = KVBlocks(number=97, size=16, caches_prefixes=True)
        reporter = MetricsReporter(
            lambda: Figures(stats, Occupancy(count, 0, stats.num_generation_tokens % 97 / 97), blocks), meters, LABELS
        )
        reporter.report()
        num_lines = 0

        def report() -> float:
            nonlocal num_lines
            seconds_of_work(stats, count)
            started = time.perf_counter()
            num_lines = reporter.report()
            return time.perf_counter() - started

        seconds = statistics.median(report() for _ in range(NUM_ROUNDS))
    return seconds, num_lines


def seconds_of_work(stats: EngineStats, count: int) -> None:
    """Values of all sizes, so that every series changes: the most that a report can be."""
    for seconds in (0.001, 0.02, 0.06, 0.12, 0.3, 2, 20, 200):
        for histogram in (
            stats.time_to_first_token,
            stats.inter_token_latency,
            stats.queue_time,
            stats.e2e_latency,
        ):
            histogram.add(seconds)
    stats.num_generation_tokens += count
    stats.num_prompt_tokens += 128


def measured_step(count: int) -> float:
    sys.path.insert(0, str(Path(__file__).parents[1]))  # where benchmark.py lies
    from benchmark import make_model
    from decode_step import make_runner, one_step

    from ts_parallel.topology import open_topology

    topology = open_topology(1, "cpu", num_threads=2)
    with TemporaryDirectory(prefix="ts-parallel-benchmark-") as folder:
        make_model(Path(folder))
        step = one_step(make_runner(Path(folder), topology), count)
        for _ in range(3):
            step()
        seconds = statistics.median(median_seconds(step, 1) for _ in range(20))
    topology.close()
    return seconds


def median_seconds(work: Callable[[], object], num_rounds: int = NUM_ROUNDS) -> float:
    seconds = []
    for _ in range(num_rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
