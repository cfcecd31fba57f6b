"""Where the bytes of a checkpoint's tensors lie: files, boxes, offsets. Knows no format of files and reads none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class StoredPart:
    """A box of a tensor as it lies in a file, row-major from byte `offset`."""

    file: Path
    corner: tuple[int, ...]
    """Where in the tensor the box begins."""
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint. Its parts, one or several, hold each of its elements exactly once."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[StoredPart, ...]

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


CheckpointIndex = Mapping[str, StoredTensor]


def stored_whole(name: str, file: Path, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> StoredTensor:
    """A tensor that lies in one piece."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return StoredTensor(name, dtype, shape, (StoredPart(file, (0,) * len(shape), shape, offset, num_bytes),))
