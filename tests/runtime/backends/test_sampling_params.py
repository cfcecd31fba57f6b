"""Each sampling parameter does what transformers' own processor of that name does, on logits of any kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ts_parallel.runtime.backends.torch import penalties, sampling
from ts_parallel.runtime.backends.torch.sampling import choose, sample
from ts_parallel.step_plan import Chunk, SamplingParams, pack, read_logprobs

NUM_TOKENS = 24
NUM_DRAWS = 1500


def logits(seed: int) -> torch.Tensor:
    return torch.randn(NUM_TOKENS, generator=torch.Generator().manual_seed(seed)) * 2


def chunk(
    params: SamplingParams,
    position: int = 1,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    allowed: bytes = b"",
) -> Chunk:
    return Chunk("", (1,), position - 1, (), True, params, pack(prompt_ids), pack(output_ids), allowed=allowed)


def adjust(own: torch.Tensor, asking: Chunk) -> torch.Tensor:
    """A row `[V]` after what the chunk changes of it."""
    rows = own[None].clone()
    penalties.adjust(rows, [asking])
    return rows[0]


def allow(*token_ids: int) -> bytes:
    """The mask of `Chunk.allowed`."""
    bits = sum(1 << token_id for token_id in token_ids)
    return bits.to_bytes(8 * (bits.bit_length() // 64 + 1), "little")


def drawn(own: torch.Tensor, params: SamplingParams) -> set[int]:
    chunks = [chunk(params, position) for position in range(1, NUM_DRAWS)]
    return set(sample(own.expand(len(chunks), -1), chunks))


def likely(processed: torch.Tensor, floor: float = 0.0) -> set[int]:
    probabilities = processed[0].softmax(-1)
    return {token for token, probability in enumerate(probabilities.tolist()) if probability > floor}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("changes", "warper"),
    [
        ({"top_k": 4}, TopKLogitsWarper(4)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
        ({"typical_p": 0.6}, TypicalLogitsWarper(0.6)),
    ],
)
def test_tokens_that_may_come_are_those_that_transformers_leaves(
    seed: int, changes: dict[str, Any], warper: Any
) -> None:
    own, temperature = logits(seed), 1.3
    processed = warper(None, TemperatureLogitsWarper(temperature)(None, own[None]))
    seen = drawn(own, SamplingParams(temperature, **changes))
    assert seen <= likely(processed)
    assert seen >= likely(processed, floor=0.02)  # all that 1,500 draws cannot miss
    assert not likely(TemperatureLogitsWarper(temperature)(None, own[None]), 0.004) <= seen  # something was left out


@pytest.mark.parametrize("seed", range(3))
def test_restrictions_follow_one_another_as_in_transformers(seed: int) -> None:
    own = logits(seed)
    processed = TemperatureLogitsWarper(1.5)(None, own[None])
    for warper in (TopKLogitsWarper(12), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1), TypicalLogitsWarper(0.9)):
        processed = warper(None, processed)
    seen = drawn(own, SamplingParams(1.5, top_p=0.8, top_k=12, min_p=0.1, typical_p=0.9))
    assert seen <= likely(processed)
    assert seen >= likely(processed, floor=0.02)


@given(
    seed=st.integers(0, 10**6), penalty=st.floats(0.3, 3), tokens=st.lists(st.integers(0, 23), min_size=1, max_size=9)
)
def test_repetition_penalty_is_that_of_transformers_over_prompt_and_answer(
    seed: int, penalty: float, tokens: list[int]
) -> None:
    own = logits(seed)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), own[None].clone())[0]
    half = len(tokens) // 2
    params = SamplingParams(repetition_penalty=penalty)
    ours = adjust(own, chunk(params, prompt_ids=tuple(tokens[:half]), output_ids=tuple(tokens[half:])))
    assert torch.allclose(ours, expected)


def test_presence_and_frequency_count_the_answers_tokens_alone() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    ours = adjust(torch.zeros(6), chunk(params, prompt_ids=(0, 1, 2), output_ids=(2, 3, 3, 3)))
    assert ours.tolist() == [0, 0, -0.75, -1.25, 0, 0]


def test_penalties_change_greedy_answers_too() -> None:
    own = torch.tensor([[1.0, 2.0, 1.9]])
    assert sample(own, [chunk(SamplingParams())]) == [1]
    assert sample(own, [chunk(SamplingParams(presence_penalty=0.2), output_ids=(1,))]) == [2]
    assert sample(own, [chunk(SamplingParams(logit_bias=((0, 5.0),)))]) == [0]


def test_bias_forbids_and_prefers() -> None:
    own = torch.zeros(4)
    forbidding = SamplingParams(1.0, logit_bias=((0, -math.inf), (1, -math.inf)))
    assert drawn(own, forbidding) == {2, 3}
    preferring = SamplingParams(1.0, logit_bias=((2, math.log(9.0)),))
    counts = Counter(sample(own.expand(1200, -1), [chunk(preferring, position) for position in range(1, 1201)]))
    assert counts[2] == pytest.approx(900, abs=90)


def test_logits_of_a_row_are_left_as_they_were() -> None:
    own = logits(0)
    before = own.clone()
    sample(own[None], [chunk(SamplingParams(presence_penalty=1.0, logit_bias=((3, 1.0),)), output_ids=(1, 2))])
    assert torch.equal(own, before)


def test_only_what_is_allowed_comes_greedy_or_hot() -> None:
    own = logits(1)
    allowed = allow(3, 5, 11)
    best = max((3, 5, 11), key=lambda token: float(own[token]))
    assert best != int(own.argmax())
    assert sample(own[None], [chunk(SamplingParams(), allowed=allowed)]) == [best]
    chunks = [chunk(SamplingParams(5.0), position, allowed=allowed) for position in range(1, 200)]
    assert set(sample(own.expand(len(chunks), -1), chunks)) == {3, 5, 11}
    narrow = SamplingParams(1.0, top_k=1, logit_bias=((5, 50.0), (7, 90.0)))
    assert sample(own[None], [chunk(narrow, allowed=allowed)]) == [5]


@pytest.mark.parametrize("size", [60, 64, 65, 128, 200])
def test_mask_reaches_every_word_and_what_it_leaves_out_is_forbidden(size: int) -> None:
    for token in {0, 31, 59, 63, 64, 127, 150} & set(range(size)):
        own = torch.zeros(1, size)
        assert sample(own, [chunk(SamplingParams(), allowed=allow(token))]) == [token]


def test_typical_sampling_does_not_stumble_over_what_is_forbidden() -> None:
    own = logits(2)
    forbidding = SamplingParams(1.0, typical_p=0.9, logit_bias=((0, -math.inf),))
    kept = drawn(own, forbidding)
    without = own.clone()
    without[0] = -1e9
    assert kept == drawn(without, SamplingParams(1.0, typical_p=0.9)) and 0 not in kept


@given(seed=st.integers(0, 10**6), num_top=st.integers(0, NUM_TOKENS), temperature=st.sampled_from([0.0, 0.7]))
def test_logprobs_are_those_of_the_raw_logits_whatever_chooses_the_token(
    seed: int, num_top: int, temperature: float
) -> None:
    own = logits(seed)
    params = SamplingParams(temperature, 0.9, seed, logit_bias=((2, 30.0),), num_logprobs=num_top)
    asking = chunk(params)
    token, *numbers = choose(own[None], [asking])
    assert token == 2  # which the raw logits hardly ever prefer
    ((found,),) = read_logprobs([asking], numbers)
    expected = own.log_softmax(dim=-1)
    assert found.logprob == float(expected[2])
    assert [logprob for _, logprob in found.top] == expected.sort(descending=True).values[:num_top].tolist()
    assert [float(expected[token]) for token, _ in found.top] == [logprob for _, logprob in found.top]


def test_nothing_is_scored_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "score", None)
    chunks = [chunk(SamplingParams()), chunk(SamplingParams(0.5, seed=3))]
    assert len(choose(logits(0).expand(2, -1), chunks)) == 2


def test_asking_for_logprobs_changes_no_token() -> None:
    own = torch.stack([logits(seed) for seed in range(6)])
    params = [SamplingParams(0.8 * (row % 2), seed=row) for row in range(6)]
    asked = [SamplingParams(0.8 * (row % 2), seed=row, num_logprobs=row) for row in range(6)]
    plain = choose(own, [chunk(one) for one in params])
    assert choose(own, [chunk(one) for one in asked])[:6] == plain


def test_scores_are_the_same_however_many_rows_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own, token_ids = torch.stack([logits(seed) for seed in range(7)]), [seed % 5 for seed in range(7)]
    at_once = sampling.score(own, token_ids, 3)
    monkeypatch.setattr(sampling, "_ROWS_AT_ONCE", 2)
    assert sampling.score(own, token_ids, 3) == at_once
