"""Who runs in a step, who waits, and that whatever happens on the way nobody's tokens change."""

from __future__ import annotations

import zlib
from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler, TokenOutput
from ts_parallel.runtime.step import SamplingParams, StepPlan


def next_token(history: tuple[int, ...]) -> int:
    """A model without weights: every token of the history changes what comes next."""
    return zlib.crc32(repr(history).encode()) % 1000


def answer(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What `next_token` says to `prompt` alone."""
    history = prompt
    for _ in range(num_tokens):
        history += (next_token(history),)
    return list(history[len(prompt) :])


class SlotRunner:
    """Owns token slots as a real runner owns keys and values. It knows no request but by its chunk's blocks."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.plans: list[StepPlan] = []
        self._slots: dict[int, int] = {}

    def run(self, plan: StepPlan) -> list[int]:
        self.plans.append(plan)
        for chunk in plan.chunks:
            for position, token in enumerate(chunk.token_ids, chunk.start):
                self._slots[self._slot(chunk.block_ids, position)] = token
        return [
            next_token(tuple(self._slots[self._slot(chunk.block_ids, position)] for position in range(chunk.end)))
            for chunk in plan.chunks
            if chunk.is_sampled
        ]

    def _slot(self, block_ids: tuple[int, ...], position: int) -> int:
        return block_ids[position // self.block_size] * self.block_size + position % self.block_size


class Bench:
    """A scheduler, its blocks and a runner, and what has come out of them."""

    def __init__(
        self, *, num_blocks: int = 32, block_size: int = 4, max_num_seqs: int = 8, max_num_batched_tokens: int = 16
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self.runner = SlotRunner(block_size)
        self.outputs: list[TokenOutput] = []
        self._engine = Engine(self.runner, self.scheduler)

    def add(self, request_id: str, num_prompt: int, max_tokens: int) -> Request:
        prompt = tuple(zlib.crc32(f"{request_id}{index}".encode()) % 1000 for index in range(num_prompt))
        request = Request(request_id, prompt, max_tokens)
        self._engine.add(request)
        return request

    def step(self, paused: Collection[str] = ()) -> list[tuple[str, int]]:
        """Run one step; who ran and how many tokens of each."""
        if not self._engine.step(paused, self.outputs.extend):
            return []
        return [(chunk.request_id, len(chunk.token_ids)) for chunk in self.runner.plans[-1].chunks]

    def finish(self) -> None:
        for _ in range(1000):
            if not self._engine.has_requests:
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
    assert scheduler.update(scheduler.schedule(), [4]) == [TokenOutput("a", 4, None)]
    assert blocks.num_free == 3
    assert scheduler.update(scheduler.schedule(), [5]) == [TokenOutput("a", 5, "stop")]
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
    assert (new.num_computed, new.block_ids) == (0, [])
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
    assert new.block_ids == []


def test_paused_request_keeps_its_blocks_from_newer_ones() -> None:
    bench = Bench(num_blocks=4)
    old, new = bench.add("old", 8, 4), bench.add("new", 7, 4)
    assert bench.step() == [("old", 8), ("new", 7)]
    assert bench.step(paused={"old"}) == [("new", 1)]
    assert bench.step(paused={"old"}) == []
    assert (old.num_computed, new.num_computed) == (8, 0)
    bench.finish()
    assert new.output_ids == answer(new.prompt_ids, 4)


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
    bench = Bench(num_blocks=2)
    bench.add("a", 7, 1)
    bench.scheduler.schedule()
    bench.add("b", 7, 1)
    assert bench.scheduler.schedule(paused={"a"}) == StepPlan()
    bench.scheduler.abort("a")
    assert bench.step() == [("b", 7)]


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
)
def test_any_schedule_gives_every_request_its_own_answer_and_loses_no_block(
    moves: list[tuple[str, int, int]], num_blocks: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    """A step pauses the requests whose bits are set, or nobody."""
    bench = Bench(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
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
            ran = bench.step(paused)
            check_step(bench, ran, paused | aborted, max_num_seqs, max_num_batched_tokens)
        check_blocks(bench, added)
    bench.finish()
    assert bench.blocks.num_free == num_blocks
    for request in added:
        outputs = [output for output in bench.outputs if output.request_id == request.request_id]
        wanted = answer(request.prompt_ids, request.max_tokens)
        if request.request_id in aborted:
            assert [output.token_id for output in outputs] == wanted[: len(outputs)]
        else:
            assert [output.token_id for output in outputs] == request.output_ids == wanted
            reasons = [output.finish_reason for output in outputs]
            assert reasons == [None] * (request.max_tokens - 1) + ["length"]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 10), st.integers(0, 3)), min_size=1, max_size=8),
    num_blocks=st.integers(6, 10),
    max_num_batched_tokens=st.integers(1, 12),
)
def test_oldest_running_request_is_in_every_step(
    sizes: list[tuple[int, int, int]], num_blocks: int, max_num_batched_tokens: int
) -> None:
    """Requests come some steps apart; however scarce blocks and tokens are, the one at the head is never held up."""
    bench = Bench(num_blocks=num_blocks, max_num_batched_tokens=max_num_batched_tokens)

    def step() -> None:
        oldest = [*bench.scheduler.running, *bench.scheduler.waiting][:1]
        assert {request.request_id for request in oldest} <= {name for name, _ in bench.step()}

    for index, (num_prompt, max_tokens, num_steps) in enumerate(sizes):
        bench.add(str(index), num_prompt, max_tokens)
        for _ in range(num_steps):
            step()
    for _ in range(sum(num_prompt + max_tokens for num_prompt, max_tokens, _ in sizes)):
        step()
    assert {output.request_id for output in bench.outputs if output.finish_reason} == set(map(str, range(len(sizes))))


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
