"""A plan that was sent as numbers is the plan that arrives, and its size is that of what is new in it."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ts_parallel.runtime.backends.torch.sampling import uniform
from ts_parallel.runtime.channel import _ROOM, _Kind
from ts_parallel.runtime.plan_codec import PLANS_TO_FORGET, PlanDecoder, PlanEncoder
from ts_parallel.step_plan import Chunk, SamplingParams, StepPlan, pack

BLOCK_SIZE = 16
NUMBERS = st.integers(0, 2**62)
REALS = st.floats(allow_nan=False)
FEW = st.lists(st.integers(0, 1), max_size=4).map(tuple)  # so that rows often begin with the last one, or nearly
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
CHUNKS = st.builds(
    Chunk,
    request_id=st.sampled_from("abc"),
    token_ids=st.lists(NUMBERS, max_size=6).map(tuple),
    start=NUMBERS,
    block_ids=FEW.map(lambda ids: array("q", ids)),
    is_sampled=st.booleans(),
    sampling=st.sampled_from([SamplingParams(), SamplingParams(temperature=0.5)]) | SAMPLING,
    prompt_ids=FEW.map(pack),
    output_ids=FEW.map(pack),
    next_ids=st.lists(NUMBERS, max_size=3).map(tuple),
    allowed=st.lists(st.sampled_from([b"12345678", b"abcdefgh"]), max_size=3).map(b"".join),
)
PLANS = st.builds(StepPlan, st.lists(CHUNKS, max_size=5).map(tuple), st.booleans(), st.booleans())


def nameless(plan: StepPlan) -> StepPlan:
    return replace(plan, chunks=tuple(replace(chunk, request_id="") for chunk in plan.chunks))


def send(plan: StepPlan) -> StepPlan:
    """As the first of all plans."""
    return PlanDecoder().decode(PlanEncoder().encode(plan))


@given(plans=st.lists(PLANS, max_size=6))
def test_any_plans_come_back_from_their_numbers(plans: list[StepPlan]) -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    for plan in plans:
        numbers = encoder.encode(plan)
        assert numbers.dtype == torch.int64
        assert numbers.dim() == 1
        assert decoder.decode(numbers) == nameless(plan)


def test_plans_may_be_under_way_while_others_are_made() -> None:
    """A chunk that has arrived stays as it is when the next one does."""
    encoder, decoder = PlanEncoder(), PlanDecoder()
    plans = [StepPlan((Chunk("a", (end,), end, array("q", range(end + 1)), True),)) for end in range(4)]
    sent = [encoder.encode(plan) for plan in plans]
    assert [decoder.decode(numbers) for numbers in sent] == list(map(nameless, plans))
    received = [plan.chunks[0].block_ids for plan in map(send, plans)]
    assert received == [array("q", range(end + 1)) for end in range(4)]


def test_masks_are_sent_as_they_are() -> None:
    masks = [number.to_bytes(8, "little") * (152_000 // 64) for number in range(32)]
    plan = StepPlan(tuple(Chunk(str(mask[0]), (5,), 3, array("q", (1,)), True, allowed=mask) for mask in masks))
    assert send(plan) == nameless(plan)


def test_sampling_comes_back_to_the_last_bit() -> None:
    sampling = SamplingParams(0.1 + 0.2, 5e-324, 2**64 - 1)  # no int64 holds such a seed
    assert send(StepPlan((Chunk("a", (5, 6), 3, (1, 0), True, sampling),))).chunks[0].sampling == sampling


@pytest.mark.parametrize(("seed", "restored"), [(-1, 2**64 - 1), (2**64, 0), (2**63, 2**63), (3**50, 3**50 % 2**64)])
def test_seed_counts_modulo_two_to_the_64_as_it_does_where_it_is_used(seed: int, restored: int) -> None:
    plan = StepPlan((Chunk("", (5,), 0, (1,), True, SamplingParams(1.0, 1.0, seed)),))
    assert send(plan).chunks[0].sampling.seed == restored
    assert uniform(seed, 7) == uniform(restored, 7)


def test_every_field_of_sampling_is_sent() -> None:
    """The first test would not see one that is neither built there nor sent."""
    defaults = SamplingParams()
    for name in SamplingParams.__dataclass_fields__:
        value = ((3, 0.5),) if name == "logit_bias" else 7
        sampling = SamplingParams(**{name: value})
        assert sampling != defaults
        assert send(StepPlan((Chunk("", (5,), 0, (1,), True, sampling),))).chunks[0].sampling == sampling


def decoding(num_sequences: int, num_tokens: int, **fields: object) -> StepPlan:
    """One more token of each sequence, which has `num_tokens` in its cache."""
    num_blocks = num_tokens // BLOCK_SIZE + 1

    def chunk(number: int) -> Chunk:
        blocks = array("q", range(number * 1000, number * 1000 + num_blocks))
        return Chunk(str(number), (7,), num_tokens, blocks, True, **fields)  # type: ignore[arg-type]

    return StepPlan(tuple(map(chunk, range(num_sequences))))


PENALIZED = SamplingParams(temperature=0.7, presence_penalty=0.5, logit_bias=tuple((n, -1.0) for n in range(300)))


def penalized(num_tokens: int) -> dict[str, object]:
    """What a chunk says of penalties, as long as nothing of it changes but the answer's length."""
    prompt = pack(range(3000))
    return {"sampling": PENALIZED, "prompt_ids": prompt, "output_ids": pack(range(num_tokens - 3000))}


@pytest.mark.parametrize("fields", [lambda _: {}, penalized])
@pytest.mark.parametrize("num_sequences", [32, 128])
def test_plan_of_known_sequences_has_a_dozen_numbers_of_each(
    num_sequences: int, fields: Callable[[int], dict[str, object]]
) -> None:
    """However long they are: 128 sequences of 4,000 tokens had 272 KB of block ids alone."""
    encoder, decoder = PlanEncoder(), PlanDecoder()
    for num_tokens in range(4000, 4040):
        plan = decoding(num_sequences, num_tokens, **fields(num_tokens))
        numbers = encoder.encode(plan)
        assert num_tokens == 4000 or len(numbers) <= 3 + 13 * num_sequences
        assert decoder.decode(numbers) == nameless(plan)


def test_largest_plans_have_room_in_shared_memory() -> None:
    """Those whose sequences begin with thousands of tokens from the prefix cache, or all have masks."""
    room = _ROOM[_Kind.NUMBERS] * 7 // 8
    assert PlanEncoder().encode(decoding(256, 8000)).nbytes < room
    assert PlanEncoder().encode(decoding(96, 4000, allowed=b"mask" * 4000)).nbytes < room


def test_sequence_that_was_preempted_is_sent_whole_and_then_known_again() -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    lengths = []
    for blocks in (range(40), range(41), range(100, 130), range(100, 131), [*range(100, 120), *range(20)], range(5)):
        plan = StepPlan((Chunk("a", (1,), 3, array("q", blocks), True),))
        numbers = encoder.encode(plan)
        lengths.append(len(numbers) - 3 - 10 - 1)
        assert decoder.decode(numbers) == nameless(plan)
    assert lengths == [40, 1, 30, 1, 40, 5]


def test_sequences_that_are_gone_are_forgotten_and_their_numbers_given_anew() -> None:
    """Each runs for three plans, and one comes back after long with all that it had."""
    encoder, decoder = PlanEncoder(), PlanDecoder()
    old = Chunk(
        "old", (1,), 3, array("q", (8, 9)), True, SamplingParams(0.5), pack((1, 2)), pack((3,)), (), b"12345678"
    )
    for number in range(3 * PLANS_TO_FORGET):
        chunks = [Chunk(str(own), (own,), 0, array("q", (own,)), True) for own in range(number, number + 3)]
        plan = StepPlan((*chunks, *([old] if number in (0, 1, 100, 150) else [])))
        assert decoder.decode(encoder.encode(plan)) == nameless(plan)
        encoder.encode(StepPlan())  # a sign of life is no step that anybody was missing in
        assert len(encoder._sent) <= PLANS_TO_FORGET + 4
    assert len(decoder._known) <= PLANS_TO_FORGET + 5


def test_ranks_that_choose_nothing_are_not_told_how() -> None:
    encoder, decoder = PlanEncoder(with_choice=False), PlanDecoder()
    chunk = Chunk("a", (5, 6), 3, array("q", (1, 0)), True, PENALIZED, pack((1, 2)), pack((3,)), (6,), b"12345678")
    for _ in range(2):
        (received,) = decoder.decode(encoder.encode(StepPlan((chunk,)))).chunks
        told = replace(chunk, request_id="", sampling=SamplingParams(), prompt_ids=b"", output_ids=b"", allowed=b"")
        assert received == told
