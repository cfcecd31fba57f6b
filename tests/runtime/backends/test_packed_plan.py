"""The chunks of a plan lie one behind the other, and each says where its tokens and its blocks begin."""

from __future__ import annotations

from array import array

import pytest
import torch

from ts_parallel.runtime.backends.packed_plan import pack
from ts_parallel.step_plan import Chunk, StepPlan


@pytest.mark.parametrize("kind", [tuple, lambda ids: array("q", ids)])
def test_chunks_say_where_their_tokens_and_blocks_begin(kind: type[tuple[int, ...]]) -> None:
    chunks = (
        Chunk("a", (11, 12, 13), 3, kind((5, 2)), is_sampled=False),
        Chunk("b", (21,), 8, kind((0, 7, 9)), is_sampled=True),
        Chunk("c", (31, 32), 0, kind((1,)), is_sampled=True, next_ids=(32,)),
    )
    packed = pack(StepPlan(chunks))
    assert packed.token_ids.tolist() == [[11, 12, 13, 21, 31, 32]]
    assert packed.positions.tolist() == [[3, 4, 5, 8, 0, 1]]
    assert packed.sampled_rows.tolist() == [3, 4, 5]
    assert packed.chunks.tolist() == [0, 3, 3, 0, 3, 1, 8, 2, 4, 2, 0, 5]
    assert packed.block_ids.tolist() == [5, 2, 0, 7, 9, 1]


def test_plan_without_samples_has_no_rows() -> None:
    rows = pack(StepPlan((Chunk("a", (1, 2), 0, (0,), is_sampled=False),))).sampled_rows
    assert (rows.shape, rows.dtype) == ((0,), torch.int64)
