"""A plan that was sent as numbers is the plan that arrives."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ts_parallel.runtime.step import Chunk, SamplingParams, StepPlan

NUMBERS = st.integers(0, 2**62)
# What a rank that follows is not told stays at its default.
CHUNKS = st.builds(
    Chunk,
    request_id=st.just(""),
    token_ids=st.lists(NUMBERS, max_size=6).map(tuple),
    start=NUMBERS,
    block_ids=st.lists(NUMBERS, max_size=4).map(tuple),
    is_sampled=st.booleans(),
)


@given(plan=st.builds(StepPlan, st.lists(CHUNKS, max_size=5).map(tuple), st.booleans()))
def test_any_plan_comes_back_from_its_numbers(plan: StepPlan) -> None:
    numbers = plan.encode()
    assert numbers.dtype == torch.int64
    assert numbers.dim() == 1
    assert StepPlan.decode(numbers.tolist()) == plan


def test_followers_are_told_neither_names_nor_how_to_sample() -> None:
    chunk = Chunk("a", (5, 6), 3, (1, 0), True, SamplingParams(0.5, 0.9, 2**64 - 1))  # no int64 holds such a seed
    assert StepPlan.decode(StepPlan((chunk,)).encode().tolist()) == StepPlan((Chunk("", (5, 6), 3, (1, 0), True),))


def test_plan_counts_the_tokens_of_all_chunks() -> None:
    chunks = (Chunk("a", (5, 6), 3, (0,), True), Chunk("b", (7,), 0, (1,), False))
    assert StepPlan(chunks).num_tokens == 3
    assert [chunk.end for chunk in chunks] == [5, 1]
    assert StepPlan().num_tokens == 0
