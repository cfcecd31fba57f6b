"""Codes that are small integers times a scale which neighbours in a row share: kernels multiply by those as they are.

O outputs, I inputs, G groups of inputs. Knows which codes say that of themselves, and no format.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ts_parallel.checkpoint.codes.blocks import CodesReader
from ts_parallel.checkpoint.stored import Box, Slice, StoredTensor
from ts_parallel.errors import CheckpointError

Read = Callable[[StoredTensor, Box], torch.Tensor]

_SMALLEST_GROUP = 8
"""Inputs; to multiply by scales of fewer takes longer than by their products."""


@dataclass(frozen=True)
class RowIntegers:
    """A weight `[O, I]` whose numbers are `integer · scale`."""

    num_bits: int
    """Of the integers, one of which is the sign."""
    integers: StoredTensor
    """int8 `[O, I]`"""
    scales: StoredTensor
    """`[O, G]`"""
    group: int
    """Neighbouring inputs that share a scale; the last of a row may be fewer."""

    def group_of(self, kept: Slice | None) -> int | None:
        """Of how many of the inputs that a rank keeps each, counted from its first, no group has two scales.

        Returns:
            None where those would be too few, or where what is kept lies in several pieces.
        """
        columns = self.columns_of(kept)
        if columns is None:
            return None
        start, length = columns
        if start // self.group == (start + length - 1) // self.group:
            return length
        group = math.gcd(self.group, start)
        return group if group % 2 == 0 and group >= _SMALLEST_GROUP else None

    def columns_of(self, kept: Slice | None) -> tuple[int, int] | None:
        """The `(start, length)` of the inputs that a rank keeps; None where they are no single piece."""
        if kept is None or kept.dim != 1:
            return 0, self.integers.shape[1]
        return kept.pieces[0] if len(kept.pieces) == 1 and kept.length else None

    def read_scales(self, rows: tuple[int, int], columns: tuple[int, int], group: int, read: Read) -> torch.Tensor:
        """Those of each `group` of the columns, `[rows, groups]`."""
        start, length = columns
        cells = torch.arange(start, start + length, group) // self.group
        first, last = int(cells[0]), int(cells[-1])
        return read(self.scales, (rows, (first, last - first + 1)))[:, cells - first]


@runtime_checkable
class HasRowIntegers(Protocol):
    """Codes that may be such."""

    def row_integers(self, read: Read) -> RowIntegers | None:
        """None where they have zero points, or groups of any inputs, or scales of several rows."""


def row_integers_of(stored: StoredTensor) -> RowIntegers | None:
    """The integers and scales that a weight is stored as; None where it is so otherwise.

    Raises:
        CheckpointError: what tells cannot be read.
    """
    if not isinstance(stored.codes, HasRowIntegers) or len(stored.shape) != 2:
        return None
    try:
        with CodesReader() as reader:
            return stored.codes.row_integers(reader.read)
    except OSError as error:
        raise CheckpointError(f"cannot read {stored.name!r} of {stored.file}: {error.strerror}") from None
