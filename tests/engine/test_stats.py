"""What the engine counts of its work, and that counting ends with a request."""

from __future__ import annotations

from collections import deque

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.engine.stats import ABORTED, FAILED, Histogram, Occupancy
from ts_parallel.step_plan import StepPlan


class PositionRunner:
    """Says the position of each token."""

    num_stages = 1

    def __init__(self) -> None:
        self._in_flight: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._in_flight.append(plan)

    def collect(self) -> list[int]:
        return [chunk.end for chunk in self._in_flight.popleft().chunks if chunk.is_sampled]


def make_engine(num_blocks: int, *, max_num_seqs: int = 8) -> Engine:
    scheduler = Scheduler(BlockManager(num_blocks, 4), max_num_seqs=max_num_seqs, max_num_batched_tokens=16)
    return Engine(PositionRunner(), scheduler)


def test_histogram_counts_a_value_up_to_and_with_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.add(value)
    assert (histogram.counts, histogram.total) == ([2, 1, 1], 12.0)


def test_tokens_and_times_are_counted_once_each() -> None:
    engine = make_engine(32)
    engine.generate([Request("a", (1, 2, 3), 4), Request("b", (4, 5), 1, eos_ids=frozenset({2}))])
    stats = engine.figures().stats
    assert (stats.num_prompt_tokens, stats.num_generation_tokens) == (5, 5)
    assert dict(stats.num_ended) == {"length": 1, "stop": 1}
    assert sum(stats.queue_time.counts) == sum(stats.time_to_first_token.counts) == sum(stats.e2e_latency.counts) == 2
    assert sum(stats.inter_token_latency.counts) == 3  # all of "a" but its first


def test_prefix_hits_are_the_tokens_that_were_not_computed() -> None:
    engine = make_engine(32)
    for name in "ab":
        engine.generate([Request(name, tuple(range(10)), 1)])
    stats = engine.figures().stats
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (20, 8)  # two full blocks of the second


def test_request_that_starts_over_is_preempted_once_and_admitted_once() -> None:
    engine = make_engine(4)
    engine.generate([Request(name, tuple(range(at, at + 8)), 6) for at, name in ((0, "old"), (100, "new"))])
    stats = engine.figures().stats
    assert stats.num_preemptions >= 1
    assert (stats.num_prompt_tokens, stats.num_generation_tokens) == (16, 12)
    assert sum(stats.queue_time.counts) == sum(stats.time_to_first_token.counts) == 2


class StuckGuide:
    """A guide that cannot go on after its first token."""

    is_finished, error = False, None

    def allowed(self) -> bytes:
        return b""

    def accept(self, token_id: int) -> None:
        self.is_finished, self.error = True, "stuck"


def test_answer_that_cannot_go_on_counts_as_an_error_and_tells_nothing_of_latencies() -> None:
    engine = make_engine(32)
    engine.generate([Request("a", (1, 2, 3), 4, guide=StuckGuide())])
    stats = engine.figures().stats
    assert dict(stats.num_ended) == {FAILED: 1}
    assert sum(stats.e2e_latency.counts) == 0


def test_occupancy_is_of_now() -> None:
    engine = make_engine(4, max_num_seqs=1)
    assert engine.figures().occupancy == Occupancy(0, 0, 0.0)
    for name in "ab":
        engine.add(Request(name, (1, 2, 3, 4, 5), 3))
    engine.step()
    assert engine.figures().occupancy == Occupancy(1, 1, 0.5)
    for name in "ab":
        engine.abort(name)
    figures = engine.figures()
    assert figures.occupancy == Occupancy(0, 0, 0.0)
    assert dict(figures.stats.num_ended) == {ABORTED: 2}
    assert sum(figures.stats.e2e_latency.counts) == 0
