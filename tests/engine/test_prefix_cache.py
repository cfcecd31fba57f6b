"""What was computed once is not computed again, for as long as its blocks remember it; and never anything else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import SlotRunner, answer

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.engine import Engine
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler
from ts_parallel.errors import EngineError
from ts_parallel.step_plan import NoToken

BLOCK_SIZE = 4


class Bench:
    def __init__(self, *, num_blocks: int = 32, num_stages: int = 1, caches_prefixes: bool = True) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE, caches_prefixes=caches_prefixes)
        scheduler = Scheduler(self.blocks, max_num_seqs=4, max_num_batched_tokens=16, num_stages=num_stages)
        self.runner = SlotRunner(BLOCK_SIZE, num_stages)
        self.engine = Engine(self.runner, scheduler)

    def run(self, *prompts: tuple[int, ...], max_tokens: int = 3) -> list[Request]:
        requests = [Request(f"{prompt}-{index}", prompt, max_tokens) for index, prompt in enumerate(prompts)]
        self.engine.generate(requests)
        for request in requests:
            assert request.output_ids == answer(request.prompt_ids, max_tokens)
        assert self.blocks.num_free == self.blocks.num_blocks
        return requests

    def num_scheduled(self) -> int:
        return sum(plan.num_tokens for plan in self.runner.plans)


def numbers(start: int, count: int) -> tuple[int, ...]:
    return tuple(range(start, start + count))


def test_same_prompt_is_computed_from_its_last_full_block_on() -> None:
    bench = Bench()
    assert bench.run(numbers(0, 10))[0].num_cached == 0
    before = bench.num_scheduled()
    assert bench.run(numbers(0, 10))[0].num_cached == 8
    assert bench.num_scheduled() - before == 2 + 2  # the rest of the prompt, and two of three answers


def test_one_token_is_always_left_to_compute() -> None:
    bench = Bench()
    bench.run(numbers(0, 8))
    assert bench.run(numbers(0, 8))[0].num_cached == 4


def test_prompts_that_part_share_what_they_have_in_common() -> None:
    bench = Bench()
    bench.run((*numbers(0, 8), *numbers(50, 4)))
    assert bench.run((*numbers(0, 8), *numbers(70, 4)))[0].num_cached == 8


def test_equal_blocks_after_other_beginnings_are_not_the_same() -> None:
    bench = Bench()
    bench.run((*numbers(0, 4), *numbers(90, 5)))
    assert bench.run((*numbers(10, 4), *numbers(90, 5)))[0].num_cached == 0


def test_answers_are_remembered_too() -> None:
    bench = Bench()
    first = bench.run(numbers(0, 4), max_tokens=9)[0]
    assert bench.run((*numbers(0, 4), *first.output_ids))[0].num_cached == 12


def test_request_that_runs_shares_its_blocks_and_keeps_them() -> None:
    bench = Bench(num_blocks=6)
    same = numbers(0, 9)
    requests = bench.run(same, same, same)  # nine blocks, had each its own
    assert {request.num_cached for request in requests} == {0, 8}


@pytest.mark.parametrize(("num_prompt", "is_enough"), [(12, True), (13, False)])
def test_paused_request_gives_only_what_it_shares_with_nobody(num_prompt: int, is_enough: bool) -> None:
    bench = Bench(num_blocks=6)
    slow, other = (Request(name, (*numbers(0, 8), last), 3) for name, last in (("slow", 50), ("other", 60)))
    bench.engine.add(slow)
    bench.engine.step()
    bench.engine.add(other)
    bench.engine.step({"slow"})
    assert slow.block_ids[:2] == other.block_ids[:2] and bench.blocks.num_free == 2
    bench.engine.add(Request("new", numbers(70, num_prompt), 1))
    bench.engine.step({"slow"})
    assert [len(plan.chunks) for plan in bench.runner.plans] == [1, 1, 2 if is_enough else 1]
    assert len(slow.block_ids) == (0 if is_enough else 3)
    while bench.engine.has_requests:
        bench.engine.step()
    assert slow.output_ids == answer(slow.prompt_ids, 3)


def test_longest_unused_is_forgotten_first_and_ends_before_beginnings() -> None:
    bench = Bench(num_blocks=6)
    bench.run(numbers(0, 9), max_tokens=1)
    bench.run(numbers(100, 9), max_tokens=1)
    bench.run(numbers(200, 9), max_tokens=1)  # takes an empty block, then the last ones of the first prompt
    assert bench.run(numbers(100, 9), max_tokens=1)[0].num_cached == 8
    assert bench.run(numbers(0, 9), max_tokens=1)[0].num_cached in (0, 4)


def test_nothing_is_remembered_where_it_is_switched_off() -> None:
    bench = Bench(caches_prefixes=False)
    bench.run(numbers(0, 10))
    assert bench.run(numbers(0, 10))[0].num_cached == 0


@pytest.mark.parametrize("num_stages", [1, 3])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_tokens_are_the_same_whatever_is_remembered(num_stages: int, data: st.DataObject) -> None:
    """Prompts of two letters share beginnings all the time; few blocks make for preemption and forgetting."""
    bench = Bench(num_blocks=data.draw(st.integers(8, 14)), num_stages=num_stages)
    prompt = st.lists(st.integers(0, 1), min_size=1, max_size=20).map(tuple)
    for _ in range(data.draw(st.integers(1, 4))):
        bench.run(*data.draw(st.lists(prompt, min_size=1, max_size=5)), max_tokens=data.draw(st.integers(1, 9)))


def test_nobody_begins_with_what_a_request_without_a_token_has_computed() -> None:
    """It may be NaN. What somebody else holds too is not lost to him."""
    bench = Bench()
    bench.run(numbers(0, 4))
    bench.runner.without_token["failing", 11] = NoToken.NOT_A_NUMBER
    with pytest.raises(EngineError):
        bench.engine.generate([Request("failing", numbers(0, 11), 3)])
    assert bench.run(numbers(0, 11))[0].num_cached == 0
    assert bench.run(numbers(0, 11))[0].num_cached == 8


def test_request_that_shares_blocks_with_one_that_fails_goes_on() -> None:
    bench = Bench()
    bench.runner.without_token["failing", 11] = NoToken.NOT_A_NUMBER
    other = Request("other", numbers(0, 12), 9)
    bench.run(numbers(0, 9))
    with pytest.raises(EngineError):
        bench.engine.generate([other, Request("failing", numbers(0, 11), 3)])
    assert other.output_ids == answer(other.prompt_ids, 9)
    assert bench.run(numbers(0, 12))[0].num_cached == 8
