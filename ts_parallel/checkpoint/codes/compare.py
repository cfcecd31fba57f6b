"""Whether two stored tensors hold the same numbers, a few at a time. Knows bytes and boxes, no format."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ts_parallel.checkpoint.codes.blocks import NUMBERS_AT_ONCE, CodesReader
from ts_parallel.checkpoint.stored import Box, StoredTensor
from ts_parallel.errors import CheckpointError


def hold_the_same(one: StoredTensor, other: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether they do once they are in `dtype`. The first difference ends it, and bytes that both share are not read.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    if one.shape != other.shape:
        return False
    if one.codes is None and other.codes is None and (one.dtype, one.parts) == (other.dtype, other.parts):
        return True
    try:
        with CodesReader() as reader:
            return all(
                torch.equal(reader.read(one, box).to(dtype), reader.read(other, box).to(dtype))
                for box in _boxes(one.shape)
            )
    except OSError as error:
        raise CheckpointError(f"cannot read {one.name!r} or {other.name!r} of {one.file}: {error.strerror}") from None


def _boxes(shape: tuple[int, ...]) -> Iterator[Box]:
    """A few rows each."""
    if not shape:
        yield ()
        return
    rows = max(1, NUMBERS_AT_ONCE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield ((start, min(rows, shape[0] - start)), *((0, size) for size in shape[1:]))
