"""Each sampling parameter does what transformers' own processor of that name does, on logits of any kind."""

from __future__ import annotations

import math
from collections import Counter
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

from ts_parallel.runtime.sampling import adjust, sample
from ts_parallel.runtime.step import Chunk, SamplingParams

NUM_TOKENS = 24
NUM_DRAWS = 1500


def logits(seed: int) -> torch.Tensor:
    return torch.randn(NUM_TOKENS, generator=torch.Generator().manual_seed(seed)) * 2


def chunk(params: SamplingParams, position: int = 1, **tokens: tuple[int, ...]) -> Chunk:
    return Chunk("", (1,), position - 1, (), True, params, **tokens)


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
    adjust(own, chunk(SamplingParams(presence_penalty=1.0, logit_bias=((3, 1.0),)), output_ids=(1, 2)))
    assert torch.equal(own, before)
