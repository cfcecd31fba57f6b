"""Computed numbers in blocks of what a rank keeps, so that of a tensor only one block at a time is in memory beside it.

Knows boxes and bytes, and what `Codes` promises; no format.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, product
from pathlib import Path
from types import TracebackType

import torch

from ts_parallel.checkpoint.stored import Box, Slice, StoredPart, StoredTensor
from ts_parallel.errors import CheckpointError

NUMBERS_AT_ONCE = 2**20
# What lies between two pieces of a box is read with them up to so many bytes: a call takes as long.
_MOST_BYTES_BETWEEN = 2**13
_MOST_OPEN_FILES = 8  # a weight's codes and scales may lie in two


class CodesReader:
    """Reads boxes of stored tensors. Owns the files that it has open."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> CodesReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, source: StoredTensor, box: Box) -> torch.Tensor:
        """What `source` has in `box`, computed where that is what it is.

        Raises:
            CheckpointError: a file ends before the bytes that its header announced.
            OSError: it cannot be read.
        """
        if not all(length for _, length in box):
            return torch.empty([length for _, length in box], dtype=source.dtype)
        if source.codes is not None:
            return source.codes.decode(box, self.read)
        if len(source.parts) == 1 and source.parts[0].shape == source.shape:
            return self._read_part(source, source.parts[0], box)
        target = torch.empty([length for _, length in box], dtype=source.dtype)
        for part in source.parts:
            own: list[tuple[int, int]] = []
            view = target
            for dim, ((start, length), corner, size) in enumerate(zip(box, part.corner, part.shape, strict=True)):
                low, high = max(start, corner), min(start + length, corner + size)
                own.append((low - corner, max(0, high - low)))
                view = view.narrow(dim, min(low - start, length), max(0, high - low))
            if all(length for _, length in own):
                view.copy_(self._read_part(source, part, tuple(own)))
        return target

    def _read_part(self, source: StoredTensor, part: StoredPart, box: Box) -> torch.Tensor:
        """`box` counts from the part's own corner."""
        cut = [dim for dim, (_, length) in enumerate(box) if length < part.shape[dim]]
        inner = math.prod(part.shape[cut[-1] + 1 :]) * source.dtype.itemsize if cut else part.num_bytes
        if cut and cut[-1] > 0:
            start, length = box[cut[-1]]
            if (part.shape[cut[-1]] - length) * inner <= _MOST_BYTES_BETWEEN:
                wide = (*box[: cut[-1]], (0, part.shape[cut[-1]]), *box[cut[-1] + 1 :])
                return self._read_part(source, part, wide).narrow(cut[-1], start, length)
        target = torch.empty([length for _, length in box], dtype=source.dtype)
        if target.numel():
            memory = target.view(-1).view(torch.uint8).numpy().data
            ranges = _ranges(part, box, inner, cut[-1]) if cut else iter([(part.offset, part.num_bytes)])
            self._read_bytes(source, part.file, ranges, memory)
        return target

    def _read_bytes(
        self, source: StoredTensor, file: Path, ranges: Iterator[tuple[int, int]], memory: memoryview
    ) -> None:
        descriptor, done = self._open(file), 0
        for start, total in ranges:
            offset, length = start, total
            while length:
                count = os.preadv(descriptor, [memory[done : done + length]], offset)
                if count == 0:
                    raise CheckpointError(f"{file} ends before {source.name!r} does; it was changed while it was read")
                offset, length, done = offset + count, length - count, done + count

    def _open(self, file: Path) -> int:
        if file not in self._descriptors:
            if len(self._descriptors) >= _MOST_OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]


def read_whole(source: StoredTensor) -> torch.Tensor:
    """All of a tensor that is small.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with CodesReader() as reader:
            return reader.read(source, tuple((0, size) for size in source.shape))
    except OSError as error:
        raise CheckpointError(f"cannot read {source.name!r} of {source.file}: {error.strerror}") from None


def _ranges(part: StoredPart, box: Box, inner: int, last: int) -> Iterator[tuple[int, int]]:
    """The `(offset, length)` bytes of a box that is whole behind dim `last`, of which one index has `inner` bytes."""
    steps = [inner]
    for size in reversed(part.shape[1 : last + 1]):
        steps.insert(0, steps[0] * size)
    start, length = box[last]
    for outer in product(*(range(begin, begin + count) for begin, count in box[:last])):
        at = sum(index * step for index, step in zip(outer, steps, strict=False))
        yield part.offset + at + start * inner, length * inner


def cut_into_blocks(source: StoredTensor, kept: Slice | None) -> Iterator[tuple[Box, Box]]:
    """Boxes of `source` that make up `kept`, a few numbers each; before each its place in a tensor of what is kept."""
    assert source.codes is not None
    pieces: list[tuple[tuple[int, int], ...]] = [((0, size),) for size in source.shape]
    if kept is not None:
        pieces[kept.dim] = kept.pieces
    order = source.codes.cut_order
    assert sorted(order) == list(range(len(source.shape)))
    back = [order.index(dim) for dim in range(len(order))]
    for places in _cut([pieces[dim] for dim in order], NUMBERS_AT_ONCE):
        yield tuple(places[dim][0] for dim in back), tuple(places[dim][1] for dim in back)


_Spans = tuple[tuple[tuple[int, int], tuple[int, int]], ...]
"""Of each dim the `(start, length)` among what is kept, and in the tensor."""


def _cut(pieces: Sequence[tuple[tuple[int, int], ...]], limit: int) -> Iterator[_Spans]:
    if not pieces:
        yield ()
        return
    own, *others = pieces
    inner = math.prod(sum(length for _, length in each) for each in others)
    step = max(1, limit // max(1, inner))
    firsts = accumulate((length for _, length in own), initial=0)
    for first, (start, total) in zip(firsts, own, strict=False):
        for done in range(0, total, step):
            length = min(step, total - done)
            for rest in _cut(others, max(1, limit // length)):
                yield ((first + done, length), (start + done, length)), *rest


def rows_of_codes(
    source: StoredTensor,
    kept: Slice | None,
    rows_at_once: int,
    read: Callable[[StoredTensor, Box], torch.Tensor],
) -> Iterator[tuple[int, torch.Tensor]]:
    """The kept rows of a computed `source` `[O, I]` in groups of a multiple of `rows_at_once`, each with the number of
    its first."""
    for first, own, columns in spans_of_rows(source.shape, kept, rows_at_once):
        found = [torch.cat([read(source, (span, each)) for each in columns], dim=1) for span in own]
        yield first, found[0] if len(found) == 1 else torch.cat(found)


def spans_of_rows(
    shape: tuple[int, ...], kept: Slice | None, rows_at_once: int
) -> Iterator[tuple[int, list[tuple[int, int]], tuple[tuple[int, int], ...]]]:
    """The kept rows of a tensor `[O, I]` in groups of a multiple of `rows_at_once`: of each the number of the first,
    and the `(start, length)` of its rows and of what is kept of each row."""
    rows, columns = (kept.pieces if kept and kept.dim == dim else ((0, shape[dim]),) for dim in (0, 1))
    width = sum(length for _, length in columns)
    step = max(1, NUMBERS_AT_ONCE // (max(1, width) * rows_at_once)) * rows_at_once
    num_rows = sum(length for _, length in rows)
    for first in range(0, num_rows, step):
        yield first, list(_overlapping(rows, first, min(first + step, num_rows))), columns


def _overlapping(pieces: Sequence[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """What of `pieces`, counted one after the other, lies in `[begin, end)`."""
    done = 0
    for start, length in pieces:
        low, high = max(begin, done), min(end, done + length)
        if low < high:
            yield start + low - done, high - low
        done += length
