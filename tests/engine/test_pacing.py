"""Prompts get on, and those who wait for their next token hardly notice."""

from __future__ import annotations

import pytest

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.pacing import PrefillPacer
from ts_parallel.engine.request import Request
from ts_parallel.engine.scheduler import Scheduler


def learnt(base: float, cost: float, max_slowdown: float = 2.0) -> PrefillPacer:
    pacer = PrefillPacer(max_slowdown)
    for _ in range(50):
        pacer.observe(num_decode=4, num_prefill=0, seconds=base)
        pacer.observe(num_decode=4, num_prefill=20, seconds=base + 20 * cost)
    return pacer


@pytest.mark.parametrize(("base", "cost"), [(0.04, 0.001), (0.1, 0.002), (0.05, 0.0001)])
def test_step_with_a_prompt_takes_at_most_so_many_times_as_long(base: float, cost: float) -> None:
    for max_slowdown in (1.5, 2.0, 4.0):
        tokens = learnt(base, cost, max_slowdown).most_prefill_tokens(1)
        assert tokens > 1
        assert base + tokens * cost <= max_slowdown * base * 1.001


def test_each_prompt_more_may_add_as_much_up_to_what_a_reader_notices() -> None:
    pacer = learnt(base=0.02, cost=0.001)
    assert [pacer.most_prefill_tokens(count) for count in (1, 2, 3, 10)] == pytest.approx([20, 40, 40, 40], abs=1)
    slow = learnt(base=0.2, cost=0.001)
    assert [slow.most_prefill_tokens(count) for count in (1, 2, 10)] == pytest.approx([200, 300, 300], abs=3)
    generous = learnt(base=0.2, cost=0.001, max_slowdown=4)
    assert [generous.most_prefill_tokens(count) for count in (1, 10)] == pytest.approx([600, 600], abs=6)


def test_cost_of_a_token_counts_by_the_tokens() -> None:
    """A small part that took long for another reason says little."""
    pacer = learnt(base=0.03, cost=0.001)
    for _ in range(10):
        pacer.observe(num_decode=4, num_prefill=300, seconds=0.03 + 300 * 0.001)
        pacer.observe(num_decode=4, num_prefill=10, seconds=0.03 + 0.04)
    assert pacer.most_prefill_tokens(1) > 25


def test_prompt_always_gets_on() -> None:
    assert learnt(base=0.001, cost=1.0).most_prefill_tokens(1) > 0


def test_cost_is_learnt_from_steps_of_prompts_alone_too() -> None:
    pacer = PrefillPacer(2.0)
    pacer.observe(num_decode=0, num_prefill=100, seconds=0.1)
    pacer.observe(num_decode=1, num_prefill=0, seconds=0.05)
    assert pacer.most_prefill_tokens(1) == 50


def test_scheduler_paces_prompts_only_while_somebody_decodes() -> None:
    pacer = learnt(base=0.03, cost=0.001)
    scheduler = Scheduler(BlockManager(64, 4), max_num_seqs=4, max_num_batched_tokens=64, pacer=pacer)
    scheduler.add(Request("first", tuple(range(50)), 10))
    assert scheduler.schedule().num_tokens == 50  # nobody waits
    scheduler.update([1])
    scheduler.add(Request("second", tuple(range(100, 180)), 1))
    sizes = [len(chunk.token_ids) for chunk in scheduler.schedule().chunks]
    assert sizes == [1, pacer.most_prefill_tokens(1)]
    assert sizes[1] < 50
    scheduler.update([1])
    scheduler.add(Request("third", tuple(range(200, 280)), 1))
    assert scheduler.schedule().num_tokens == 1 + pacer.most_prefill_tokens(2)
