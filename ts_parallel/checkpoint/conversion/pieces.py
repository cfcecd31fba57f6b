"""Stored tensors in pieces of a few rows, and what a format of files makes of them. Knows no disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ts_parallel.checkpoint.index import CheckpointIndex, StoredTensor
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.stored import Slice

PIECE_BYTES = 64 * 2**20

Lengths = Mapping[str, Sequence[int]]
"""File name → bytes of each of its pieces as they were encoded."""

_SILENT = Progress("piece", is_shown=False)


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor: few enough to be in memory together."""

    source: StoredTensor
    rows: tuple[int, int] | None
    """`(start, length)` along dim 0; None for a tensor that has no dims."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape if self.rows is None else (self.rows[1], *self.source.shape[1:])

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.source.dtype.itemsize

    def read(self) -> torch.Tensor:
        """
        Raises:
            CheckpointError: as `load_tensors` does.
        """
        return self.read_from(self.source)

    def read_from(self, stored: StoredTensor) -> torch.Tensor:
        """The same rows of another tensor of this shape and dtype.

        Raises:
            CheckpointError: as `load_tensors` does.
        """
        tensor = torch.empty(self.shape, dtype=stored.dtype)
        if tensor.nbytes:
            kept = None if self.rows is None or self.shape == stored.shape else Slice(0, (self.rows,))
            load_tensors([LoadItem(tensor, stored, kept)], _SILENT)
        return tensor


def cut_rows(source: StoredTensor, start: int = 0, end: int | None = None) -> list[Piece]:
    """The rows from `start` to before `end` in pieces of at most `PIECE_BYTES`, or one row where that is more."""
    if not source.shape:
        return [Piece(source, None)]
    end = source.shape[0] if end is None else end
    row = torch.Size(source.shape[1:]).numel() * source.dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, row))
    firsts = range(start, end, step) or [start]  # no rows are a piece too: the tensor has a name
    return [Piece(source, (first, min(step, end - first))) for first in firsts]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written: `head`, then every piece as its format encodes it."""

    name: str
    head: bytes
    pieces: tuple[Piece, ...]


class Format(Protocol):
    """How a checkpoint is laid out in files."""

    @property
    def settings(self) -> Mapping[str, str | int]:
        """What two runs must have in common for one to go on with the other's files."""

    def plan(self, index: CheckpointIndex) -> list[PlannedFile]:
        """
        Raises:
            CheckpointError: a tensor that the format has no way to write.
        """

    def encode(self, tensor: torch.Tensor) -> memoryview: ...

    def index_file(self, files: Sequence[PlannedFile], lengths: Lengths) -> tuple[str, bytes] | None:
        """Name and content of the file that says where everything is, if there is one."""
