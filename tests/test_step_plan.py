"""A plan counts its tokens and its results, and a result is read as it was written."""

from __future__ import annotations

import math

import pytest
import torch

from ts_parallel.runtime.backends.torch.sampling import choose
from ts_parallel.step_plan import Chunk, SamplingParams, StepPlan, TokenLogprobs, read_logprobs


def test_plan_counts_the_tokens_of_all_chunks() -> None:
    chunks = (Chunk("a", (5, 6), 3, (0,), True), Chunk("b", (7,), 0, (1,), False))
    assert StepPlan(chunks).num_tokens == 3
    assert [chunk.end for chunk in chunks] == [5, 1]
    assert StepPlan().num_tokens == 0


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
