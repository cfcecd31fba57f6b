"""Tokens chosen where the logits are, in one go, are torch's, whatever the rows' requests ask for."""

from __future__ import annotations

import math

import pytest
import torch

from ts_parallel.runtime.backends.cuda.sampling import sample
from ts_parallel.runtime.backends.torch import sampling as plain
from ts_parallel.step_plan import Chunk, SamplingParams, pack

NUM_TOKENS = 700

ALLOWED = b"\x0f" + bytes(7) + b"\xff" * 8 + bytes(80 - 8)
KINDS = {
    "greedy": SamplingParams(),
    "all tokens": SamplingParams(1.0),
    "hot": SamplingParams(3.0, seed=5),
    "top_p": SamplingParams(0.8, top_p=0.9, seed=1),
    "top_k": SamplingParams(1.5, top_k=7, seed=2),
    "min_p": SamplingParams(1.5, min_p=0.1, seed=3),
    "typical_p": SamplingParams(1.0, typical_p=0.5, seed=4),
    "all at once": SamplingParams(1.2, top_p=0.95, top_k=50, min_p=0.01, typical_p=0.9, seed=2**64 - 1),
    "penalties": SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "bias": SamplingParams(1.0, logit_bias=((3, 4.0), (5, -math.inf)), seed=9),
    "cold": SamplingParams(1e-6, seed=8),
}


def chunk_of(kind: str, position: int, allowed: bytes = b"") -> Chunk:
    history = pack(range(position % 5, 40, 3)) if KINDS[kind].needs_history else b""
    return Chunk(kind, (1,), position, (), True, KINDS[kind], history, history, allowed=allowed)


def rows(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 3 * torch.randn(number, NUM_TOKENS, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_kind_are_torchs(kind: str, dtype: torch.dtype) -> None:
    chunks = [chunk_of(kind, position) for position in range(40)]
    logits = rows(40, dtype)
    before = logits.clone()
    assert sample(logits, chunks) == plain.sample(logits, chunks)
    assert torch.equal(logits, before)  # they may be scored afterwards


def test_tokens_of_all_kinds_in_one_step_are_torchs() -> None:
    chunks = [chunk_of(kind, position, ALLOWED * (position == 3)) for position in range(8) for kind in KINDS]
    logits = rows(len(chunks))
    assert sample(logits, chunks) == plain.sample(logits, chunks)


def test_rows_of_which_none_can_be_chosen_are_told_and_harm_no_neighbour() -> None:
    logits = rows(6)
    logits[1, 5], logits[2], logits[3, 7], logits[4, 0] = torch.nan, -torch.inf, torch.inf, torch.nan
    for kind in KINDS:
        chunks = [chunk_of(kind, position) for position in range(6)]
        found = sample(logits, chunks)
        assert found == plain.sample(logits, chunks)
        assert found[1:5] == [-1, -2, 7, -1]


def test_row_of_which_nothing_is_allowed_is_told() -> None:
    chunks = [chunk_of("hot", 1, bytes(88)), chunk_of("hot", 1)]
    found = sample(rows(2), chunks)
    assert found[0] == -2 and found == plain.sample(rows(2), chunks)


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 5), []) == []
