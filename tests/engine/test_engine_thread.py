"""The engine's thread runs ahead of its readers, but not far, and no stream hangs whatever happens to it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from ts_parallel.engine import engine as engine_module
from ts_parallel.engine import router as router_module
from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import MAX_TOKENS_AHEAD, SECONDS_TO_FORGET, Engine, EngineThread
from ts_parallel.engine.request import Request
from ts_parallel.engine.router import Delivery
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.engine.stats import TIMED_OUT
from ts_parallel.step_plan import StepPlan

NUM_BLOCKS = 64


class CountingRunner:
    """Says the position of each token while its gate is open; raises once it is told to."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.fails = False
        self.gate = threading.Event()
        self.gate.set()
        self.plans: list[StepPlan] = []
        self._in_flight: deque[StepPlan] = deque()

    @property
    def num_signs_of_life(self) -> int:
        return self.plans.count(StepPlan())

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        if plan.chunks:
            self._in_flight.append(plan)

    def collect(self) -> list[int]:
        self.gate.wait()
        if self.fails:
            raise RuntimeError("out of luck")
        return [chunk.end for chunk in self._in_flight.popleft().chunks if chunk.is_sampled]


class Bench:
    def __init__(self, num_blocks: int, num_stages: int) -> None:
        self.runner = CountingRunner(num_stages)
        self.blocks = BlockManager(num_blocks, block_size=16)
        self.num_failures = 0
        scheduler = Scheduler(self.blocks, max_num_seqs=8, max_num_batched_tokens=64, num_stages=num_stages)
        self.thread = EngineThread(Engine(self.runner, scheduler), self._on_failure)

    def _on_failure(self) -> None:
        self.num_failures += 1

    def submit(self, request_id: str, max_tokens: int) -> None:
        self.thread.submit(Request(request_id, (0,), max_tokens))

    def read_to_the_end(self, request_id: str) -> Delivery:
        whole = Delivery()

        def reads() -> bool:
            part = self.thread.router.take(request_id)
            whole.token_ids += part.token_ids
            whole.finish_reason, whole.error = part.finish_reason, part.error
            return part.is_last

        wait_until(reads)
        return whole


@contextmanager
def started(num_blocks: int = NUM_BLOCKS, num_stages: int = 1) -> Iterator[Bench]:
    bench = Bench(num_blocks, num_stages)
    bench.thread.start()
    try:
        yield bench
    finally:
        bench.runner.fails = True  # ends the thread
        bench.runner.gate.set()
        bench.submit("end", 1)
        wait_until(lambda: not bench.thread.is_alive)


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


STAGES = pytest.mark.parametrize("num_stages", [1, 3])


@STAGES
def test_tokens_come_without_anybody_asking_for_steps(num_stages: int) -> None:
    with started(num_stages=num_stages) as bench:
        bench.submit("a", 3)
        assert bench.read_to_the_end("a") == Delivery([1, 2, 3], "length")


def test_request_that_comes_during_a_step_is_in_the_next() -> None:
    with started() as bench:
        bench.runner.gate.clear()
        bench.submit("a", 30)
        wait_until(lambda: bool(bench.runner.plans))
        bench.submit("b", 2)
        bench.runner.gate.set()
        assert bench.read_to_the_end("b") == Delivery([1, 2], "length")
        assert bench.read_to_the_end("a") == Delivery(list(range(1, 31)), "length")
        steps = [[chunk.request_id for chunk in plan.chunks] for plan in bench.runner.plans]
        assert steps[:4] == [["a"], ["a", "b"], ["a", "b"], ["a"]]


def test_engine_stops_ahead_of_a_reader_who_does_not_read_and_goes_on_after() -> None:
    with started() as bench:
        router = bench.thread.router
        bench.submit("slow", 3 * MAX_TOKENS_AHEAD)
        wait_until(lambda: "slow" in router.full(MAX_TOKENS_AHEAD))
        bench.submit("quick", 2 * MAX_TOKENS_AHEAD)
        bench.read_to_the_end("quick")  # as many steps, in each of which "slow" could have run
        assert router.take("slow") == Delivery(list(range(1, MAX_TOKENS_AHEAD + 1)))
        rest = bench.read_to_the_end("slow")
        assert rest == Delivery(list(range(MAX_TOKENS_AHEAD + 1, 3 * MAX_TOKENS_AHEAD + 1)), "length")


@STAGES
def test_abort_closes_the_mailbox_at_once_and_frees_the_blocks(num_stages: int) -> None:
    with started(num_stages=num_stages) as bench:
        bench.submit("a", 10**6)  # more than there are blocks for: it would not end by itself
        wait_until(lambda: bench.blocks.num_free < NUM_BLOCKS)
        bench.thread.abort("a")
        with pytest.raises(KeyError):
            bench.thread.router.take("a")
        wait_until(lambda: bench.blocks.num_free == NUM_BLOCKS)
        bench.submit("b", 2)
        assert bench.read_to_the_end("b") == Delivery([1, 2], "length")


def test_request_that_is_aborted_in_flight_holds_up_nobody() -> None:
    with started(num_stages=2) as bench:
        bench.runner.gate.clear()
        bench.submit("a", 30)
        wait_until(lambda: bool(bench.runner.plans))  # the engine waits for its token
        bench.thread.abort("a")
        bench.submit("b", 2)
        bench.runner.gate.set()
        assert bench.read_to_the_end("b") == Delivery([1, 2], "length")
        wait_until(lambda: bench.blocks.num_free == NUM_BLOCKS)
        assert not bench.thread.router.wait(0)


def test_request_may_be_aborted_after_its_end() -> None:
    with started() as bench:
        bench.submit("a", 1)
        bench.read_to_the_end("a")
        bench.thread.abort("a")
        bench.thread.abort("nobody")
        bench.submit("b", 2)
        assert bench.read_to_the_end("b") == Delivery([1, 2], "length")


@STAGES
def test_failure_ends_every_stream_with_an_error_and_is_reported_once(num_stages: int) -> None:
    with started(num_stages=num_stages) as bench:
        bench.submit("finished", 1)
        wait_until(lambda: bench.thread.router.wait(0))
        for name in "ab":
            bench.submit(name, 1000)
        wait_until(lambda: bench.thread.router.full(2) == {"a", "b"})
        bench.runner.fails = True
        for name in "ab":
            assert bench.read_to_the_end(name).error == "the engine failed: RuntimeError: out of luck"
        assert bench.thread.router.take("finished") == Delivery([1], "length")
        wait_until(lambda: not bench.thread.is_alive)
        assert bench.num_failures == 1


def test_idle_engine_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "SECONDS_BETWEEN_SIGNS_OF_LIFE", 0.02)
    with started() as bench:
        wait_until(lambda: bench.runner.num_signs_of_life >= 2)
        bench.submit("a", 2)
        assert bench.read_to_the_end("a") == Delivery([1, 2], "length")


@STAGES
def test_engine_gives_signs_of_life_while_all_its_requests_are_paused(
    monkeypatch: pytest.MonkeyPatch, num_stages: int
) -> None:
    monkeypatch.setattr(engine_module, "SECONDS_BETWEEN_SIGNS_OF_LIFE", 0.02)
    with started(num_stages=num_stages) as bench:
        bench.submit("a", 2 * MAX_TOKENS_AHEAD)
        wait_until(lambda: "a" in bench.thread.router.full(MAX_TOKENS_AHEAD))
        before = bench.runner.num_signs_of_life
        wait_until(lambda: bench.runner.num_signs_of_life >= before + 2)
        assert bench.read_to_the_end("a").finish_reason == "length"


def test_request_whose_reader_left_makes_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(router_module, "time", SimpleNamespace(monotonic=lambda: now))
    with started(num_blocks=10) as bench:
        bench.submit("forgotten", 2 * MAX_TOKENS_AHEAD)
        wait_until(lambda: "forgotten" in bench.thread.router.full(MAX_TOKENS_AHEAD))
        now += SECONDS_TO_FORGET + 1
        bench.thread.submit(Request("next", (0,) * 150, max_tokens=1))  # needs all blocks
        assert bench.read_to_the_end("next") == Delivery([150], "length")
        delivery = bench.thread.router.take("forgotten")  # a reader who comes back after all finds an error
        assert len(delivery.token_ids) == MAX_TOKENS_AHEAD and delivery.error is not None


@STAGES
def test_progress_is_told_while_a_step_is_under_way_and_changes_with_each(num_stages: int) -> None:
    with started(num_stages=num_stages) as bench:
        assert bench.thread.progress is None
        bench.submit("a", 4)
        bench.read_to_the_end("a")
        wait_until(lambda: bench.thread.progress is None)
        bench.runner.gate.clear()
        bench.submit("b", 2)
        wait_until(lambda: bench.thread.progress is not None)
        before = bench.thread.progress
        assert before is not None and before >= 4
        bench.runner.gate.set()
        bench.read_to_the_end("b")
        wait_until(lambda: bench.thread.progress is None)


def test_sign_of_life_that_has_to_wait_counts_as_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "SECONDS_BETWEEN_SIGNS_OF_LIFE", 0.02)
    with started() as bench:
        seen: list[int | None] = []
        monkeypatch.setattr(bench.runner, "submit", lambda plan: seen.append(bench.thread.progress))
        wait_until(lambda: bool(seen))
        monkeypatch.undo()
        assert seen[0] == 0
        wait_until(lambda: bench.thread.progress is None)


def test_finished_request_that_nobody_read_for_long_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with started() as bench:
        bench.submit("a", 1)
        wait_until(lambda: bench.thread.router.wait(0))
        monkeypatch.setattr(engine_module, "SECONDS_TO_FORGET", -1.0)
        bench.submit("b", 1)
        wait_until(lambda: not bench.thread.router._emptied_at)
        assert bench.thread.router.take("a") == Delivery([1], "length")


def test_companions_run_side_by_side_and_are_aborted_together() -> None:
    with started() as bench:
        requests = [Request(name, (0,), 10**6) for name in ("a", "a/1", "a/2")]
        bench.thread.submit(*requests)
        assert bench.thread.num_open == 3
        wait_until(lambda: all(request.output_ids for request in requests))
        bench.thread.abort("a")
        assert bench.thread.num_open == 0
        wait_until(lambda: bench.blocks.num_free == NUM_BLOCKS)


def test_request_that_was_aborted_before_it_came_does_not_run() -> None:
    with started() as bench:
        bench.thread.reserve("a")
        bench.thread.reserve("b")
        assert bench.thread.num_open == 2
        bench.thread.abort("a")
        assert not bench.thread.submit(Request("a", (0,), 3), Request("a/1", (0,), 3), is_reserved=True)
        assert bench.thread.submit(Request("b", (0,), 2), is_reserved=True)
        assert bench.read_to_the_end("b") == Delivery([1, 2], "length")
        assert bench.thread.num_open == 1


def test_request_that_is_stopped_keeps_its_mailbox() -> None:
    with started() as bench:
        bench.submit("a", 10**6)
        wait_until(lambda: bool(bench.thread.router.take("a").token_ids))
        bench.thread.stop("a")
        wait_until(lambda: bench.blocks.num_free == NUM_BLOCKS)
        bench.thread.router.take("a")
        bench.thread.abort("a")


def test_request_whose_time_is_over_gives_its_blocks_back() -> None:
    with started() as bench:
        bench.thread.submit(Request("a", (0,), 10**6), Request("a/1", (0,), 3), seconds=0.2)
        assert bench.read_to_the_end("a/1").finish_reason == "length"
        assert bench.read_to_the_end("a").error == "the request took longer than its 0.2 s"
        wait_until(lambda: bench.blocks.num_free == NUM_BLOCKS)
        assert bench.thread.figures().stats.num_ended == {"length": 1, TIMED_OUT: 1}
        bench.submit("b", 2)
        assert bench.read_to_the_end("b") == Delivery([1, 2], "length")
