"""Where the bytes of a checkpoint's tensors lie: files, boxes, offsets. Knows no format of files and reads none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

Box = tuple[tuple[int, int], ...]
"""`(start, length)` of each dim."""

NameFinder = Callable[[Mapping[str, tuple[str | int, ...]], Path], dict[str, str]]
"""Of the tensors that a checkpoint holds, by key the path of dicts and names under which each was saved: key → what the
model calls it, for those that are the model's. Told the file or folder too, which its errors name."""


@dataclass(frozen=True)
class Slice:
    """What a rank keeps of a tensor: along `dim`, the `(start, length)` pieces in this order; all of the other dims."""

    dim: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        return sum(length for _, length in self.pieces)


@dataclass(frozen=True)
class StoredPart:
    """A box of a tensor as it lies in a file, row-major from byte `offset`."""

    file: Path
    corner: tuple[int, ...]
    """Where in the tensor the box begins."""
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Codes(Protocol):
    """How a tensor's numbers are computed of others that are stored: small integers, scales, tables. A format's own."""

    @property
    def cut_order(self) -> tuple[int, ...]:
        """The dims of the tensor, the one first along which its codes are best read in pieces."""

    def decode(self, box: Box, read: Callable[[StoredTensor, Box], torch.Tensor]) -> torch.Tensor:
        """The numbers of `box`, of which there are some, in the dtype that the format's own code computes them in.

        Args:
            read: gives what a stored tensor has in a box.
        """


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint. Its parts, one or several, hold each of its elements exactly once."""

    name: str
    dtype: torch.dtype
    """Of computed numbers, the one that the checkpoint's configuration names for weights."""
    shape: tuple[int, ...]
    parts: tuple[StoredPart, ...]
    """Where its numbers are computed, those of its codes."""
    codes: Codes | None = None
    """What computes its numbers; None where they lie there as they are."""
    form: str = ""
    """What its codes are, for people."""

    @property
    def file(self) -> Path:
        """The one that holds it, or its first part."""
        return self.parts[0].file

    @property
    def offset(self) -> int:
        """Of its first byte in `file`."""
        return self.parts[0].offset

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, length: int) -> StoredTensor:
        """Those alone, under the same name."""
        shape = (length, *self.shape[1:])
        if self.codes is not None:
            return replace(self, shape=shape, codes=_CodesOfRows(self.codes, start))
        parts = []
        for part in self.parts:
            first, *others = part.corner
            low, high = max(start, first), min(start + length, first + part.shape[0])
            if low < high:
                row = part.num_bytes // part.shape[0]
                corner, kept = (low - start, *others), (high - low, *part.shape[1:])
                parts.append(StoredPart(part.file, corner, kept, part.offset + (low - first) * row, (high - low) * row))
        return replace(self, shape=shape, parts=tuple(parts))


@dataclass(frozen=True)
class _CodesOfRows:
    whole: Codes
    start: int

    @property
    def cut_order(self) -> tuple[int, ...]:
        return self.whole.cut_order

    def decode(self, box: Box, read: Callable[[StoredTensor, Box], torch.Tensor]) -> torch.Tensor:
        (first, length), *others = box
        return self.whole.decode(((self.start + first, length), *others), read)


CheckpointIndex = Mapping[str, StoredTensor]


def stored_whole(name: str, file: Path, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> StoredTensor:
    """A tensor that lies in one piece."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return StoredTensor(name, dtype, shape, (StoredPart(file, (0,) * len(shape), shape, offset, num_bytes),))
