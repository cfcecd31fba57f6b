"""A plan that was sent as numbers is the plan that arrives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ts_parallel.runtime.sampling import uniform
from ts_parallel.runtime.step import Chunk, SamplingParams, StepPlan

NUMBERS = st.integers(0, 2**62)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, allow_nan=False),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**64 - 1),
)
# What is not sent stays at its default.
CHUNKS = st.builds(
    Chunk,
    request_id=st.just(""),
    token_ids=st.lists(NUMBERS, max_size=6).map(tuple),
    start=NUMBERS,
    block_ids=st.lists(NUMBERS, max_size=4).map(tuple),
    is_sampled=st.booleans(),
    sampling=SAMPLING,
)


@given(plan=st.builds(StepPlan, st.lists(CHUNKS, max_size=5).map(tuple), st.booleans(), st.booleans()))
def test_any_plan_comes_back_from_its_numbers(plan: StepPlan) -> None:
    numbers = plan.encode()
    assert numbers.dtype == torch.int64
    assert numbers.dim() == 1
    assert StepPlan.decode(numbers.tolist()) == plan


def test_sampling_comes_back_to_the_last_bit_and_names_stay_at_home() -> None:
    sampling = SamplingParams(0.1 + 0.2, 5e-324, 2**64 - 1)  # no int64 holds such a seed
    plan = StepPlan((Chunk("a", (5, 6), 3, (1, 0), True, sampling),), wants_logits=True)
    restored = StepPlan.decode(plan.encode().tolist())
    assert restored == StepPlan((Chunk("", (5, 6), 3, (1, 0), True, sampling),), wants_logits=True)


@pytest.mark.parametrize(("seed", "restored"), [(-1, 2**64 - 1), (2**64, 0), (2**63, 2**63), (3**50, 3**50 % 2**64)])
def test_seed_counts_modulo_two_to_the_64_as_it_does_where_it_is_used(seed: int, restored: int) -> None:
    plan = StepPlan((Chunk("", (5,), 0, (1,), True, SamplingParams(1.0, 1.0, seed)),))
    assert StepPlan.decode(plan.encode().tolist()).chunks[0].sampling.seed == restored
    assert uniform(seed, 7) == uniform(restored, 7)


def test_plan_counts_the_tokens_of_all_chunks() -> None:
    chunks = (Chunk("a", (5, 6), 3, (0,), True), Chunk("b", (7,), 0, (1,), False))
    assert StepPlan(chunks).num_tokens == 3
    assert [chunk.end for chunk in chunks] == [5, 1]
    assert StepPlan().num_tokens == 0
