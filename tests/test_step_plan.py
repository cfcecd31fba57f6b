"""A plan that was sent as numbers is the plan that arrives."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ts_parallel.runtime.backends.torch.sampling import choose, uniform
from ts_parallel.step_plan import Chunk, SamplingParams, StepPlan, TokenLogprobs, pack, read_logprobs

NUMBERS = st.integers(0, 2**62)
REALS = st.floats(allow_nan=False)
SAMPLING = st.builds(
    SamplingParams,
    temperature=REALS,
    top_p=REALS,
    seed=st.integers(0, 2**64 - 1),
    top_k=NUMBERS,
    min_p=REALS,
    typical_p=REALS,
    repetition_penalty=REALS,
    presence_penalty=REALS,
    frequency_penalty=REALS,
    logit_bias=st.lists(st.tuples(NUMBERS, REALS), max_size=3).map(tuple),
    num_logprobs=st.none() | st.integers(0, 20),
)
# All but the request's name.
CHUNKS = st.builds(
    Chunk,
    request_id=st.just(""),
    token_ids=st.lists(NUMBERS, max_size=6).map(tuple),
    start=NUMBERS,
    block_ids=st.lists(NUMBERS, max_size=4).map(tuple),
    is_sampled=st.booleans(),
    sampling=SAMPLING,
    prompt_ids=st.lists(NUMBERS, max_size=3).map(pack),
    output_ids=st.lists(NUMBERS, max_size=3).map(pack),
    next_ids=st.lists(NUMBERS, max_size=3).map(tuple),
    allowed=st.lists(st.binary(min_size=8, max_size=8), max_size=3).map(b"".join),
)


@given(plan=st.builds(StepPlan, st.lists(CHUNKS, max_size=5).map(tuple), st.booleans(), st.booleans()))
def test_any_plan_comes_back_from_its_numbers(plan: StepPlan) -> None:
    numbers = plan.encode()
    assert numbers.dtype == torch.int64
    assert numbers.dim() == 1
    assert StepPlan.decode(numbers) == plan


def test_masks_of_a_whole_batch_are_sent_in_a_small_part_of_a_step() -> None:
    """As Python's numbers, they took ten times as long."""
    masks = [number.to_bytes(8, "little") * (152_000 // 64) for number in range(32)]
    chunks = tuple(Chunk("", (5,), 3, (1,), True, allowed=mask) for mask in masks)
    plan = StepPlan(chunks)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        plan.encode()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.002
    assert StepPlan.decode(plan.encode()) == plan


def test_sampling_comes_back_to_the_last_bit_and_names_stay_at_home() -> None:
    sampling = SamplingParams(0.1 + 0.2, 5e-324, 2**64 - 1)  # no int64 holds such a seed
    plan = StepPlan((Chunk("a", (5, 6), 3, (1, 0), True, sampling),), wants_logits=True)
    restored = StepPlan.decode(plan.encode())
    assert restored == StepPlan((Chunk("", (5, 6), 3, (1, 0), True, sampling),), wants_logits=True)


@pytest.mark.parametrize(("seed", "restored"), [(-1, 2**64 - 1), (2**64, 0), (2**63, 2**63), (3**50, 3**50 % 2**64)])
def test_seed_counts_modulo_two_to_the_64_as_it_does_where_it_is_used(seed: int, restored: int) -> None:
    plan = StepPlan((Chunk("", (5,), 0, (1,), True, SamplingParams(1.0, 1.0, seed)),))
    assert StepPlan.decode(plan.encode()).chunks[0].sampling.seed == restored
    assert uniform(seed, 7) == uniform(restored, 7)


def test_plan_counts_the_tokens_of_all_chunks() -> None:
    chunks = (Chunk("a", (5, 6), 3, (0,), True), Chunk("b", (7,), 0, (1,), False))
    assert StepPlan(chunks).num_tokens == 3
    assert [chunk.end for chunk in chunks] == [5, 1]
    assert StepPlan().num_tokens == 0


def test_every_field_of_sampling_is_sent() -> None:
    """The test above would not see one that is neither built there nor sent."""
    defaults = SamplingParams()
    for name in SamplingParams.__dataclass_fields__:
        value = ((3, 0.5),) if name == "logit_bias" else 7
        sampling = SamplingParams(**{name: value})
        assert sampling != defaults
        plan = StepPlan((Chunk("", (5,), 0, (1,), True, sampling),))
        assert StepPlan.decode(plan.encode()) == plan


def test_logprobs_come_back_to_the_chunks_and_rows_they_are_of() -> None:
    two, none, zero = (SamplingParams(num_logprobs=count) for count in (2, None, 0))
    chunks = (
        Chunk("a", (1, 2, 3), 0, (0,), False, two, next_ids=(2, 3, 0)),
        Chunk("b", (1,), 0, (1,), True, none),
        Chunk("c", (1, 2), 0, (2,), True, zero, next_ids=(2,)),
        Chunk("d", (1,), 4, (3,), True, two),
    )
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 7).log_softmax(dim=-1)
    logits[6] = torch.tensor([math.log(0.5), math.log(0.25), -math.inf, math.log(0.25)])
    numbers = choose(logits, chunks)
    assert len(numbers) == StepPlan(chunks).num_results == 3 + 3 * 5 + 2 * 1 + 5
    assert numbers[:3] == [3, 3, 0]
    first, second, third, last = read_logprobs(chunks, numbers[3:])
    row = logits.log_softmax(dim=-1)[0].tolist()
    best = ((3, row[3]), (2, row[2]))
    assert first == tuple(TokenLogprobs(row[token], best) for token in (2, 3, 0))
    assert second == ()
    assert third == (TokenLogprobs(row[2]), TokenLogprobs(row[3]))
    assert [token.logprob for token in last] == [pytest.approx(math.log(0.5))]
    assert last[0].top[0] == (0, last[0].logprob)
