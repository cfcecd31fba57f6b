"""Who runs in a step, who waits, and that whatever happens on the way nobody's tokens change."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.pacing import PrefillPacer
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler, TokenOutput
from ts_parallel.errors import EngineError
from ts_parallel.runtime.plan_codec import PlanDecoder, PlanEncoder
from ts_parallel.step_plan import NoToken, SamplingParams, StepPlan


def next_token(history: tuple[int, ...]) -> int:
    """A model without weights: every token of the history changes what comes next."""
    return zlib.crc32(repr(history).encode()) % 1000


def answer(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What `next_token` says to `prompt` alone."""
    history = prompt
    for _ in range(num_tokens):
        history += (next_token(history),)
    return list(history[len(prompt) :])


class Stage:
    """Owns token slots as a real stage owns keys and values. It knows no request but by its chunk's blocks."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[int, int] = {}

    def run(self, plan: StepPlan) -> list[int]:
        for chunk in plan.chunks:
            for position, token in enumerate(chunk.token_ids, chunk.start):
                self._slots[self._slot(chunk.block_ids, position)] = token
        return [
            next_token(tuple(self._slots[self._slot(chunk.block_ids, position)] for position in range(chunk.end)))
            for chunk in plan.chunks
            if chunk.is_sampled
        ]

    def _slot(self, block_ids: Sequence[int], position: int) -> int:
        return block_ids[position // self._block_size] * self._block_size + position % self._block_size


class SlotRunner:
    """The first stage runs a step when it is submitted, the last one as late as it may: when it is collected. That one
    has the plan from what was sent of it."""

    def __init__(self, block_size: int, num_stages: int) -> None:
        self.num_stages = num_stages
        self.plans: list[StepPlan] = []
        self.in_flight: deque[tuple[StepPlan, StepPlan, list[int]]] = deque()  # with what arrives of the plan
        self.without_token: dict[tuple[str, int], NoToken] = {}
        """By request and length: where there is none to choose."""
        self._first, self._last = Stage(block_size), Stage(block_size)
        self._encoder, self._decoder = PlanEncoder(), PlanDecoder()

    def submit(self, plan: StepPlan) -> None:
        waiting_for_a_token = {
            chunk.request_id for earlier, _, _ in self.in_flight for chunk in earlier.chunks if chunk.is_sampled
        }
        assert not waiting_for_a_token & {chunk.request_id for chunk in plan.chunks}
        self.plans.append(plan)
        received = self._decoder.decode(self._encoder.encode(plan))
        assert received == replace(plan, chunks=tuple(replace(chunk, request_id="") for chunk in plan.chunks))
        self.in_flight.append((plan, received, self._first.run(plan)))
        assert len(self.in_flight) <= self.num_stages

    def collect(self) -> list[int]:
        plan, received, token_ids = self.in_flight.popleft()
        assert self._last.run(received) == token_ids
        sampled = [chunk for chunk in plan.chunks if chunk.is_sampled]
        return [
            self.without_token.get((chunk.request_id, chunk.end), token)
            for chunk, token in zip(sampled, token_ids, strict=True)
        ]


class Bench:
    """An engine, its scheduler, blocks and runner, and what has come out of them."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        num_stages: int = 1,
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_stages=num_stages,
        )
        self.runner = SlotRunner(block_size, num_stages)
        self.outputs: list[TokenOutput] = []
        self.engine = Engine(self.runner, self.scheduler)

    def add(self, request_id: str, num_prompt: int, max_tokens: int, priority: int = 0) -> Request:
        prompt = tuple(zlib.crc32(f"{request_id}{index}".encode()) % 1000 for index in range(num_prompt))
        request = Request(request_id, prompt, max_tokens, priority=priority)
        self.engine.add(request)
        return request

    def step(self, paused: Collection[str] = ()) -> list[tuple[str, int]]:
        """Let the engine do one step; who was started in it and how many tokens of each."""
        num_before = len(self.runner.plans)
        self.engine.step(paused, self.outputs.extend)
        return [
            (chunk.request_id, len(chunk.token_ids)) for plan in self.runner.plans[num_before:] for chunk in plan.chunks
        ]

    def tokens(self, request_id: str) -> list[int | None]:
        return [output.token_id for output in self.outputs if output.request_id == request_id]

    def finish(self) -> None:
        for _ in range(4000):
            if not self.engine.has_requests:
                assert not self.runner.in_flight
                return
            self.step()
        raise AssertionError(f"still there: {[*self.scheduler.running, *self.scheduler.waiting]}")


def test_first_come_first_served_within_the_number_of_requests() -> None:
    bench = Bench(max_num_seqs=2)
    for name in "abc":
        bench.add(name, 3, 2)
    assert bench.step() == [("a", 3), ("b", 3)]
    assert bench.step() == [("a", 1), ("b", 1)]
    assert bench.step() == [("c", 3)]


def test_request_joins_while_others_run_and_leaves_before_them() -> None:
    bench = Bench()
    bench.add("long", 2, 5)
    assert bench.step() == [("long", 2)]
    bench.add("short", 3, 2)
    assert bench.step() == [("long", 1), ("short", 3)]
    assert bench.step() == [("long", 1), ("short", 1)]
    assert bench.step() == [("long", 1)]
    assert [output.request_id for output in bench.outputs if output.finish_reason] == ["short"]


def test_step_never_has_more_tokens_than_its_budget() -> None:
    bench = Bench(max_num_batched_tokens=5)
    bench.add("a", 3, 2)
    bench.add("b", 3, 2)
    assert bench.step() == [("a", 3), ("b", 2)]
    assert bench.step() == [("a", 1), ("b", 1)]


def test_long_prompt_runs_in_chunks_and_only_the_last_is_sampled() -> None:
    bench = Bench(max_num_batched_tokens=4)
    request = bench.add("a", 10, 1)
    assert [bench.step() for _ in range(4)] == [[("a", 4)], [("a", 4)], [("a", 2)], []]
    chunks = [plan.chunks[0] for plan in bench.runner.plans]
    assert [(chunk.start, chunk.is_sampled) for chunk in chunks] == [(0, False), (4, False), (8, True)]
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == request.prompt_ids
    assert request.output_ids == answer(request.prompt_ids, 1)


def test_decoding_requests_run_before_a_prefill_that_was_paused() -> None:
    bench = Bench(max_num_batched_tokens=4)
    bench.add("long", 12, 1)
    assert bench.step() == [("long", 4)]
    bench.add("short", 2, 3)
    assert bench.step(paused={"long"}) == [("short", 2)]
    assert bench.step() == [("short", 1), ("long", 3)]


def test_long_prompt_does_not_hold_up_decoding() -> None:
    bench = Bench(max_num_batched_tokens=4)
    bench.add("short", 2, 4)
    bench.step()
    bench.add("long", 20, 1)
    assert bench.step() == [("short", 1), ("long", 3)]
    assert bench.step() == [("short", 1), ("long", 3)]
    assert bench.step() == [("short", 1), ("long", 3)]
    assert bench.step() == [("long", 4)]


def test_more_decoding_requests_than_the_budget_run_in_order_of_arrival() -> None:
    bench = Bench(max_num_batched_tokens=2)
    for name in "abc":
        bench.add(name, 1, 3)
    assert bench.step() == [("a", 1), ("b", 1)]
    assert bench.step() == [("a", 1), ("b", 1)]
    assert bench.step() == [("a", 1), ("b", 1)]
    assert bench.step() == [("c", 1)]


def test_chunk_carries_what_its_request_asks_of_sampling() -> None:
    scheduler = Scheduler(BlockManager(4, 4), max_num_seqs=4, max_num_batched_tokens=16)
    sampling = SamplingParams(temperature=0.5, top_p=0.9, seed=3)
    scheduler.add(Request("a", (1,), 1, sampling))
    assert scheduler.schedule().chunks[0].sampling == sampling


def test_end_token_ends_a_request_and_frees_its_blocks() -> None:
    blocks = BlockManager(4, 4)
    scheduler = Scheduler(blocks, max_num_seqs=4, max_num_batched_tokens=16)
    scheduler.add(Request("a", (1, 2), 9, eos_ids=frozenset({5})))
    scheduler.schedule()
    assert scheduler.update([4]) == [TokenOutput("a", 4, None)]
    assert blocks.num_free == 3
    scheduler.schedule()
    assert scheduler.update([5]) == [TokenOutput("a", 5, "stop")]
    assert blocks.num_free == 4
    assert scheduler.schedule() == StepPlan()


def test_request_waits_until_all_its_prompt_finds_blocks() -> None:
    bench = Bench(num_blocks=4, max_num_batched_tokens=4)
    bench.add("a", 4, 2)
    bench.step()
    bench.add("b", 13, 1)
    bench.add("c", 1, 1)
    assert bench.step() == [("a", 1)]  # "c", which would fit, does not overtake "b"
    assert bench.step() == [("b", 4)]


def test_oldest_request_goes_on_when_blocks_run_out_and_the_newest_starts_over() -> None:
    bench = Bench(num_blocks=4)
    old, new = bench.add("old", 8, 6), bench.add("new", 8, 6)
    assert bench.step() == [("old", 8), ("new", 8)]
    assert bench.step() == [("old", 1)]
    assert (new.num_scheduled, len(new.block_ids)) == (0, 0)
    while not any(output.finish_reason for output in bench.outputs):
        assert ("old", 1) in bench.step()
    assert bench.outputs[-1].request_id == "old"
    assert bench.step() == [("new", 9)]  # its prompt and the token it had, which it keeps
    bench.finish()
    assert old.output_ids == answer(old.prompt_ids, 6)
    assert new.output_ids == answer(new.prompt_ids, 6)
    assert [output.token_id for output in bench.outputs if output.request_id == "new"] == new.output_ids


def test_preempted_requests_come_back_in_order_of_admission_before_later_ones() -> None:
    bench = Bench(num_blocks=6, max_num_batched_tokens=32)
    for name in "abc":
        bench.add(name, 8, 9)
    bench.step()
    bench.add("later", 1, 1)
    for _ in range(5):
        bench.step()
    assert [request.request_id for request in bench.scheduler.waiting] == ["b", "c", "later"]
    ran = [name for _ in range(40) for name, _ in bench.step()]
    assert list(dict.fromkeys(ran)) == ["a", "b", "c", "later"]


def test_newest_request_steps_back_rather_than_take_blocks_of_older_ones() -> None:
    bench = Bench(num_blocks=5)
    old, new = bench.add("old", 9, 6), bench.add("new", 7, 6)
    assert bench.step() == [("old", 9), ("new", 7)]
    assert bench.step() == [("old", 1), ("new", 1)]
    assert bench.step() == [("old", 1)]
    assert len(old.block_ids) == 3
    assert not new.block_ids


def test_less_urgent_request_gives_its_blocks_to_a_more_urgent_one_that_came_later() -> None:
    bench = Bench(num_blocks=4, block_size=4)
    lax = bench.add("lax", 7, 6, priority=1)
    assert bench.step() == [("lax", 7)]
    urgent = bench.add("urgent", 7, 6)
    assert bench.step() == [("lax", 1), ("urgent", 7)]
    assert bench.step() == [("urgent", 1)]  # "lax" wants a third block: its own are the first to go
    assert bench.step() == [("urgent", 1)]
    assert (lax.num_scheduled, len(lax.block_ids)) == (0, 0)
    assert len(urgent.block_ids) == 3
    bench.finish()
    for request in (lax, urgent):
        assert bench.tokens(request.request_id) == request.output_ids == answer(request.prompt_ids, 6)
    assert [output.request_id for output in bench.outputs if output.finish_reason] == ["urgent", "lax"]


def test_of_equally_urgent_requests_the_one_that_came_last_steps_back_first() -> None:
    """Whichever was admitted last: here it is the oldest, which was preempted while it was paused."""
    bench = Bench(num_blocks=6, block_size=4)
    old, middle = bench.add("old", 8, 8), bench.add("middle", 7, 9)
    bench.step()
    bench.add("new", 13, 1)
    assert bench.step(paused={"old"}) == [("middle", 1), ("new", 13)]
    assert not old.block_ids
    assert bench.step() == [("middle", 1), ("old", 9)]
    while bench.scheduler.figures().stats.num_preemptions == 1:
        bench.step()
    assert bench.scheduler.running == [old] and list(bench.scheduler.waiting) == [middle]
    bench.finish()
    for request in (old, middle):
        assert bench.tokens(request.request_id) == request.output_ids == answer(request.prompt_ids, request.max_tokens)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_urgent_request_runs_to_its_end_before_less_urgent_ones_that_want_its_blocks(num_stages: int) -> None:
    bench = Bench(num_blocks=6, block_size=2, num_stages=num_stages)
    lax = [bench.add(f"lax{number}", 3, 6, priority=2) for number in range(2)]
    bench.step()
    urgent = bench.add("urgent", 4, 7, priority=-1)
    bench.finish()
    ends = [output.request_id for output in bench.outputs if output.finish_reason]
    assert ends[0] == "urgent"
    assert bench.scheduler.figures().stats.num_preemptions > 0
    for request in (*lax, urgent):
        assert bench.tokens(request.request_id) == request.output_ids == answer(request.prompt_ids, request.max_tokens)


def test_paused_request_gives_its_blocks_to_those_that_run() -> None:
    bench = Bench(num_blocks=4)
    old, new = bench.add("old", 8, 4), bench.add("new", 7, 4)
    assert bench.step() == [("old", 8), ("new", 7)]
    assert bench.step(paused={"old"}) == [("new", 1)]
    assert len(old.block_ids) == 2  # as long as nobody needs them
    assert bench.step(paused={"old"}) == [("new", 1)]
    assert (old.num_scheduled, len(old.block_ids)) == (0, 0)
    bench.finish()
    for request in (old, new):
        assert bench.tokens(request.request_id) == request.output_ids == answer(request.prompt_ids, 4)


def test_least_urgent_of_the_paused_gives_its_blocks_first() -> None:
    bench = Bench(num_blocks=5, block_size=4)
    lax, strict = bench.add("lax", 4, 6, priority=3), bench.add("strict", 4, 6, priority=2)
    bench.add("runs", 8, 6, priority=4)
    bench.step()
    for _ in range(2):
        bench.step(paused={"lax", "strict"})
    assert (len(lax.block_ids), len(strict.block_ids)) == (1, 1)  # there was one that nobody had
    for _ in range(4):
        bench.step(paused={"lax", "strict"})
    assert (len(lax.block_ids), len(strict.block_ids)) == (0, 1)
    bench.finish()


def test_request_that_was_preempted_and_paused_holds_up_nobody_and_keeps_its_place() -> None:
    bench = Bench(num_blocks=4)
    first, slow = bench.add("first", 8, 6), bench.add("slow", 8, 6)
    bench.step()
    bench.step()
    assert (len(first.block_ids), len(slow.block_ids)) == (3, 0)
    paused = {"slow"}
    while bench.scheduler.running:
        bench.step(paused)
    bench.add("new", 13, 2)
    bench.add("later", 13, 1)
    assert bench.step(paused) == [("new", 13)]
    assert bench.step() == [("new", 1)]  # the reader is back, the blocks are not free yet
    assert bench.step() == [("slow", 9)]  # its prompt and the token it had; "later" has not passed it
    bench.finish()
    assert bench.tokens("slow") == slow.output_ids == answer(slow.prompt_ids, 6)
    assert [output.request_id for output in bench.outputs if output.finish_reason] == ["first", "new", "slow", "later"]


def test_paused_request_gives_its_seat_to_one_that_waits_and_is_the_next_to_get_one() -> None:
    bench = Bench(max_num_seqs=2)
    slow, other = bench.add("slow", 3, 4), bench.add("other", 3, 4)
    bench.add("new", 3, 2)
    bench.add("later", 3, 2)
    assert bench.step() == [("slow", 3), ("other", 3)]
    assert bench.step(paused={"slow"}) == [("other", 1), ("new", 3)]
    assert [request.request_id for request in bench.scheduler.waiting] == ["slow", "later"]
    assert bench.step() == [("other", 1), ("new", 1)]
    assert bench.step() == [("other", 1), ("slow", 4)]
    bench.finish()
    for request in (slow, other):
        assert bench.tokens(request.request_id) == request.output_ids == answer(request.prompt_ids, 4)


def test_paused_request_keeps_what_it_has_where_it_would_not_be_enough() -> None:
    bench = Bench(num_blocks=4, max_num_seqs=2)
    slow = bench.add("slow", 3, 3)
    bench.add("other", 3, 3)
    bench.step()
    bench.add("big", 13, 1)
    assert bench.step(paused={"slow"}) == [("other", 1)]
    assert (slow.num_scheduled, len(slow.block_ids)) == (3, 1)


def test_requests_that_were_preempted_wait_in_order_of_arrival_whoever_was_the_first() -> None:
    bench = Bench(num_blocks=6, max_num_batched_tokens=32)
    for name in "abc":
        bench.add(name, 8, 9)
    bench.step()
    bench.step(paused={"b", "c"})  # "a" takes the blocks of the latest
    assert [request.request_id for request in bench.scheduler.waiting] == ["c"]
    for _ in range(4):
        bench.step(paused={"c"})
    bench.add("later", 1, 1)
    assert [request.request_id for request in bench.scheduler.waiting] == ["b", "c", "later"]
    ran = [name for _ in range(40) for name, _ in bench.step()]
    assert list(dict.fromkeys(ran)) == ["a", "b", "c", "later"]


def test_paused_one_in_flight_is_waited_for_and_then_preempted() -> None:
    bench = Bench(num_blocks=4, num_stages=2)
    slow, new = bench.add("slow", 8, 6), bench.add("new", 7, 6)
    assert [bench.step(), bench.step()] == [[("slow", 8)], [("new", 7)]]
    assert bench.step({"slow"}) == []  # "new" is in flight, and alone
    assert bench.step({"slow"}) == [("new", 1)]
    assert bench.step({"slow"}) == []
    assert bench.step({"slow"}) == [("new", 1)]
    assert not slow.block_ids
    bench.finish()
    for request in (slow, new):
        assert bench.tokens(request.request_id) == request.output_ids == answer(request.prompt_ids, 6)


def test_prompt_is_not_paced_for_the_sake_of_one_that_is_paused() -> None:
    pacer = PrefillPacer(1.1)
    scheduler = Scheduler(BlockManager(99, 4), max_num_seqs=4, max_num_batched_tokens=200, pacer=pacer)
    scheduler.add(Request("slow", (1,), 9))
    scheduler.schedule()
    scheduler.update([1])
    scheduler.add(Request("new", (2,) * 150, 9))
    chunks = scheduler.schedule(paused={"slow"}).chunks
    assert [(chunk.request_id, len(chunk.token_ids)) for chunk in chunks] == [("new", 150)]


def test_request_that_is_in_the_step_already_keeps_its_blocks_in_it() -> None:
    """Only a request that was paused in its prompt can be older than one that decodes, and run after it."""
    bench = Bench(num_blocks=4, max_num_batched_tokens=6)
    old = bench.add("old", 12, 1)
    assert bench.step() == [("old", 6)]
    new = bench.add("new", 4, 3)
    assert bench.step(paused={"old"}) == [("new", 4)]
    assert ("new", 1) in bench.step()  # its second block is the last
    bench.finish()
    assert old.output_ids == answer(old.prompt_ids, 1)
    assert new.output_ids == answer(new.prompt_ids, 3)


def test_paused_request_sits_out_and_goes_on_where_it_was() -> None:
    bench = Bench()
    paused = bench.add("paused", 3, 3)
    bench.add("other", 3, 3)
    bench.step()
    assert bench.step(paused={"paused"}) == [("other", 1)]
    assert bench.step(paused={"paused", "other"}) == []
    assert bench.step() == [("paused", 1), ("other", 1)]
    bench.finish()
    assert paused.output_ids == answer(paused.prompt_ids, 3)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_aborted_request_is_gone_with_its_blocks_wherever_it_was(num_steps: int) -> None:
    """Waiting, in the middle of its prompt, decoding."""
    bench = Bench(max_num_batched_tokens=4)
    bench.add("a", 6, 5)
    for _ in range(num_steps):
        bench.step()
    assert (bench.blocks.num_free < 32) == bool(num_steps)
    bench.scheduler.abort("a")
    assert bench.blocks.num_free == 32
    assert bench.step() == []


def test_abort_of_one_leaves_the_others() -> None:
    bench = Bench()
    bench.add("a", 2, 3)
    other = bench.add("b", 2, 3)
    bench.step()
    bench.scheduler.abort("a")
    bench.scheduler.abort("nobody")
    bench.finish()
    assert other.output_ids == answer(other.prompt_ids, 3)


def test_blocks_of_an_aborted_request_let_a_waiting_one_in() -> None:
    bench = Bench(num_blocks=3)
    bench.add("a", 7, 5)
    bench.step()
    bench.add("b", 7, 1)
    assert bench.step() == [("a", 1)]
    bench.engine.abort("a")
    assert bench.step() == [("b", 7)]


def test_single_request_has_one_step_in_flight_until_its_token_is_known() -> None:
    bench = Bench(num_stages=3)
    request = bench.add("a", 3, 3)
    assert [bench.step() for _ in range(6)] == [[("a", 3)], [], [("a", 1)], [], [("a", 1)], []]
    assert request.output_ids == answer(request.prompt_ids, 3)


def test_requests_are_dealt_over_the_stages() -> None:
    bench = Bench(num_stages=2)
    for name in "abcde":
        bench.add(name, 1, 3)
    ran = [[name for name, _ in bench.step()] for _ in range(6)]
    assert ran == [["a", "b", "c"], ["d", "e"]] * 3
    bench.finish()
    assert len(bench.runner.plans) == 6


def test_requests_that_find_no_blocks_or_no_place_are_not_counted_among_those_to_deal() -> None:
    for limits in ({"max_num_seqs": 2}, {"num_blocks": 2}):
        bench = Bench(num_stages=2, **limits)
        for name in "abcdef":
            bench.add(name, 1, 2)
        assert [bench.step(), bench.step()] == [[("a", 1)], [("b", 1)]]


def test_paused_requests_are_not_counted_among_those_to_deal() -> None:
    bench = Bench(num_stages=2)
    for name in "abcd":
        bench.add(name, 1, 9)
    for _ in range(4):
        bench.step(paused="cd")
    assert [[chunk.request_id for chunk in plan.chunks] for plan in bench.runner.plans] == [["a"], ["b"], ["a"], ["b"]]


def test_long_prompt_has_a_chunk_in_every_stage() -> None:
    bench = Bench(num_stages=3, max_num_batched_tokens=4)
    request = bench.add("a", 11, 2)
    assert [bench.step() for _ in range(3)] == [[("a", 4)], [("a", 4)], [("a", 3)]]
    assert len(bench.runner.in_flight) == 2  # the third has pushed the first one out
    bench.finish()
    assert request.output_ids == answer(request.prompt_ids, 2)


def test_abort_in_flight_frees_the_blocks_at_once_and_drops_what_comes_of_it() -> None:
    bench = Bench(num_blocks=2, num_stages=2)
    bench.add("a", 7, 5)
    bench.step()
    bench.engine.abort("a")
    assert bench.blocks.num_free == 2
    other = bench.add("b", 7, 2)
    assert bench.step() == [("b", 7)]  # in the blocks that the last stage has yet to fill for "a"
    bench.finish()
    assert bench.outputs == [TokenOutput("b", *pair) for pair in zip(other.output_ids, (None, "length"), strict=True)]
    assert other.output_ids == answer(other.prompt_ids, 2)


def test_next_request_of_the_same_name_gets_none_of_the_aborted_ones_tokens() -> None:
    bench = Bench(num_stages=3)
    bench.add("a", 3, 5)
    bench.step()
    bench.engine.abort("a")
    request = Request("a", (1, 2), 2)
    bench.engine.add(request)
    while bench.engine.has_requests:  # not by `finish`, whose runner knows requests by their names
        plan = bench.scheduler.schedule()
        bench.scheduler.update([7 if chunk.start else 8 for chunk in plan.chunks] or [9])
    assert request.num_in_flight == 0
    assert len(request.output_ids) == 2


def test_engine_collects_what_is_in_flight_after_everybody_has_left() -> None:
    bench = Bench(num_stages=4)
    bench.add("a", 40, 1)
    bench.step()
    bench.step()
    bench.engine.abort("a")
    assert bench.engine.has_requests
    assert [bench.engine.step() for _ in range(3)] == [True, True, False]
    assert not bench.engine.has_requests
    assert bench.outputs == []


def test_blocks_in_flight_are_waited_for_and_then_taken() -> None:
    bench = Bench(num_blocks=4, num_stages=2)
    old, new = bench.add("old", 8, 6), bench.add("new", 7, 6)
    assert [bench.step(), bench.step()] == [[("old", 8)], [("new", 7)]]
    assert bench.step() == []  # "old" needs a block; "new", in flight, holds the last
    assert new.num_in_flight == 0 and len(new.block_ids) == 2
    assert bench.step() == [("old", 1)]
    assert (new.num_scheduled, len(new.block_ids)) == (0, 0)
    bench.finish()
    for request in (old, new):
        assert bench.tokens(request.request_id) == request.output_ids == answer(request.prompt_ids, 6)


def test_nobody_is_admitted_while_one_that_runs_lacks_blocks() -> None:
    bench = Bench(num_blocks=7, max_num_batched_tokens=8, num_stages=2)
    bench.add("old", 4, 9)
    long = bench.add("long", 24, 1)
    assert [bench.step() for _ in range(4)] == [[("old", 4)], [("long", 8)], [("old", 1)], [("long", 8)]]
    bench.add("small", 1, 1)
    assert (bench.blocks.num_free, long.num_in_flight) == (1, 1)
    assert bench.step() == [("old", 1)]
    bench.finish()
    assert [output.request_id for output in bench.outputs if output.finish_reason] == ["old", "long", "small"]


MOVES = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 14), st.integers(1, 10)),
    st.tuples(st.just("abort"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("step"), st.integers(0, 2**6 - 1), st.integers(0, 1)),
)


@settings(max_examples=300, deadline=None)
@given(
    moves=st.lists(MOVES, max_size=40),
    num_blocks=st.integers(1, 12),
    block_size=st.integers(1, 5),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 12),
    num_stages=st.integers(1, 4),
)
def test_any_schedule_gives_every_request_its_own_answer_and_loses_no_block(
    moves: list[tuple[str, int, int]],
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_stages: int,
) -> None:
    """A step pauses the requests whose bits are set, or nobody."""
    bench = Bench(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_stages=num_stages,
    )
    room, added, aborted = num_blocks * block_size, list[Request](), set[str]()
    for move, first, second in moves:
        if move == "add" and first < room:
            added.append(bench.add(str(len(added)), first, min(second, room - first)))
        elif move == "abort" and first < len(added):
            bench.scheduler.abort(str(first))
            aborted.add(str(first))
        elif move == "step":
            paused = {str(index) for index in range(len(added)) if first >> index % 6 & 1} if second else set[str]()
            in_flight = {request: request.num_scheduled for request in bench.scheduler.running if request.num_in_flight}
            ran = bench.step(paused)
            check_step(bench, ran, paused | aborted, max_num_seqs, max_num_batched_tokens)
            for request, num_scheduled in in_flight.items():  # it has lost nothing
                assert request.num_scheduled >= num_scheduled
                assert request in bench.scheduler.running or request.finish_reason()
        check_blocks(bench, added)
    bench.finish()
    assert bench.blocks.num_free == num_blocks
    for request in added:
        outputs = [output for output in bench.outputs if output.request_id == request.request_id]
        wanted = answer(request.prompt_ids, request.max_tokens)
        assert request.num_in_flight == 0
        if request.request_id in aborted:
            assert [output.token_id for output in outputs] == wanted[: len(outputs)]
        else:
            assert [output.token_id for output in outputs] == request.output_ids == wanted
            reasons = [output.finish_reason for output in outputs]
            assert reasons == [None] * (request.max_tokens - 1) + ["length"]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 10), st.integers(0, 3)), min_size=1, max_size=8),
    num_blocks=st.integers(6, 10),
    max_num_batched_tokens=st.integers(1, 12),
    num_stages=st.integers(1, 4),
)
def test_oldest_running_request_is_in_every_step(
    sizes: list[tuple[int, int, int]], num_blocks: int, max_num_batched_tokens: int, num_stages: int
) -> None:
    """Requests come some steps apart; however scarce blocks and tokens are, the one at the head is never held up.

    Over several stages it is in flight, or waits for no more than what is: the blocks of later ones, or its turn.
    """
    bench = Bench(num_blocks=num_blocks, max_num_batched_tokens=max_num_batched_tokens, num_stages=num_stages)
    num_held_up = 0

    def step() -> None:
        nonlocal num_held_up
        oldest = [*bench.scheduler.running, *bench.scheduler.waiting][:1]
        was_in_flight = any(request.num_in_flight for request in oldest)
        runs = {request.request_id for request in oldest} <= {name for name, _ in bench.step()}
        num_held_up = 0 if runs or was_in_flight else num_held_up + 1
        assert num_held_up <= 2 * (num_stages - 1)  # as many steps as may be started and collected before

    for index, (num_prompt, max_tokens, num_steps) in enumerate(sizes):
        bench.add(str(index), num_prompt, max_tokens)
        for _ in range(num_steps):
            step()
    for _ in range(num_stages * sum(num_prompt + max_tokens for num_prompt, max_tokens, _ in sizes)):
        step()
    assert {output.request_id for output in bench.outputs if output.finish_reason} == set(map(str, range(len(sizes))))


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 10), st.integers(0, 3)), min_size=1, max_size=8),
    slow=st.sets(st.integers(0, 7)),
    num_blocks=st.integers(6, 10),
    max_num_seqs=st.integers(1, 4),
    max_num_batched_tokens=st.integers(1, 12),
    num_stages=st.integers(1, 4),
)
def test_requests_whose_readers_never_come_back_hold_up_nobody(
    sizes: list[tuple[int, int, int]],
    slow: set[int],
    num_blocks: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_stages: int,
) -> None:
    """Requests come some steps apart, and all run; from then on some are paused, until the others are done."""
    bench = Bench(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_stages=num_stages,
    )
    added = []
    for index, (num_prompt, max_tokens, num_steps) in enumerate(sizes):
        added.append(bench.add(str(index), num_prompt, max_tokens))
        for _ in range(num_steps):
            bench.step()
    paused = {str(index) for index in slow}
    for _ in range(4000):
        done = {output.request_id for output in bench.outputs if output.finish_reason}
        if not bench.engine.step(paused, bench.outputs.extend):
            break
    assert done >= {request.request_id for request in added} - paused
    bench.finish()
    for request in added:
        assert bench.tokens(request.request_id) == answer(request.prompt_ids, request.max_tokens)


def check_step(
    bench: Bench, ran: list[tuple[str, int]], left_out: set[str], max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    names = [name for name, _ in ran]
    assert len(names) == len(set(names)) <= max_num_seqs
    assert not set(names) & left_out
    assert sum(num_tokens for _, num_tokens in ran) <= max_num_batched_tokens
    assert len(bench.scheduler.running) <= max_num_seqs


def check_blocks(bench: Bench, added: list[Request]) -> None:
    held = [block for request in added for block in request.block_ids]
    assert len(held) == len(set(held)) == bench.blocks.num_blocks - bench.blocks.num_free
    running = {request.request_id for request in bench.scheduler.running}
    assert {request.request_id for request in added if request.block_ids} <= running
    assert all(request.num_scheduled <= request.num_tokens for request in added)
    assert all(
        len(request.block_ids) * bench.blocks.block_size >= request.num_scheduled for request in bench.scheduler.running
    )


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("reason", list(NoToken))
@pytest.mark.parametrize("length", [5, 8])
def test_request_without_a_token_to_choose_fails_alone(num_stages: int, reason: NoToken, length: int) -> None:
    bench = Bench(num_stages=num_stages)
    failing, others = bench.add("failing", 5, 9), [bench.add(name, 5, 9) for name in ("before", "beside")]
    bench.runner.without_token["failing", length] = reason
    bench.finish()
    for other in others:
        assert other.output_ids == answer(other.prompt_ids, 9) and other.error is None
    assert failing.output_ids == answer(failing.prompt_ids, length - 5)
    last = [output for output in bench.outputs if output.request_id == "failing"][-1]
    assert (last.token_id, last.finish_reason, last.fault) == (None, None, "engine")
    assert last.error == failing.error
    assert ("NaN" in str(last.error)) == (reason is NoToken.NOT_A_NUMBER)
    assert bench.blocks.num_free == bench.blocks.num_blocks
    assert bench.scheduler.figures().stats.num_ended == {"error": 1, "length": 2}


def test_caller_of_generate_is_told_which_request_has_failed_once_the_others_are_done() -> None:
    bench = Bench()
    bench.runner.without_token["1", 6] = NoToken.NOT_A_NUMBER
    requests = [Request(str(number), (number, 1, 2, 3), 5) for number in range(3)]
    with pytest.raises(EngineError, match=r"request 1 of 3, after 2 tokens: .* NaN"):
        bench.engine.generate(requests)
    assert [len(request.output_ids) for request in requests] == [5, 2, 5]
    assert bench.engine.generate([Request("again", (1, 1, 2, 3), 2)]) == [answer((1, 1, 2, 3), 2)]
