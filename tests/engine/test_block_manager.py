"""A block has one holder or none, and what is given back can be given again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ts_parallel.engine.block_manager import BlockManager
from ts_parallel.engine.request import Request


def request(request_id: str = "a") -> Request:
    return Request(request_id, (1,), max_tokens=1)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_tokens_take_as_many_blocks_as_they_fill_or_begin(num_tokens: int, num_blocks: int) -> None:
    blocks, one = BlockManager(num_blocks=3, block_size=4), request()
    blocks.hold(one, num_tokens)
    assert len(one.block_ids) == num_blocks
    assert blocks.num_free == 3 - num_blocks


def test_request_that_grows_keeps_its_blocks_in_order() -> None:
    blocks, one, other = BlockManager(num_blocks=8, block_size=2), request("a"), request("b")
    blocks.hold(one, 3)
    before = one.block_ids[:]
    blocks.hold(other, 1)
    blocks.hold(one, 4)
    assert one.block_ids == before  # its last block had room
    blocks.hold(one, 5)
    assert one.block_ids[:-1] == before


def test_request_can_be_held_up_to_the_last_free_slot_and_no_further() -> None:
    blocks, one, other = BlockManager(num_blocks=3, block_size=4), request("a"), request("b")
    blocks.hold(other, 4)
    assert blocks.can_hold(one, 8)
    assert not blocks.can_hold(one, 9)
    blocks.hold(one, 8)
    assert blocks.can_hold(one, 8)  # what it holds already needs no free block
    assert not blocks.can_hold(other, 5)


def test_released_blocks_are_free_and_held_no_more() -> None:
    blocks, one = BlockManager(num_blocks=2, block_size=1), request()
    blocks.hold(one, 2)
    blocks.release(one)
    assert not one.block_ids
    assert blocks.num_free == 2
    blocks.release(one)
    assert blocks.num_free == 2


@given(moves=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=40), block_size=st.integers(1, 5))
def test_no_block_is_lost_or_held_twice(moves: list[tuple[int, int]], block_size: int) -> None:
    """Each move lets one request grow to so many tokens, or give all back at 0."""
    blocks = BlockManager(num_blocks=6, block_size=block_size)
    requests = [request(str(index)) for index in range(4)]
    for index, num_tokens in moves:
        if num_tokens == 0:
            blocks.release(requests[index])
        elif blocks.can_hold(requests[index], num_tokens):
            blocks.hold(requests[index], num_tokens)
            assert len(requests[index].block_ids) * block_size >= num_tokens
        held = [block for one in requests for block in one.block_ids]
        assert len(held) == len(set(held)) == 6 - blocks.num_free
        assert set(held) <= set(range(6))
