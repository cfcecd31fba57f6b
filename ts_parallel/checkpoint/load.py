"""Bytes of a file → this rank's parameter, and nothing else: only the kept byte ranges are read.

`preadv` straight into the parameter keeps peak memory at what is kept; a mapped file would count every page that a
column shard touches. Where dtype or device differ, or a stored part is no contiguous piece of the parameter, the bytes
pass through one small staging buffer.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.stored import StoredPart, StoredTensor
from ts_parallel.errors import CheckpointError

STAGING_BYTES = 8 * 2**20
# So far ahead of what is being read the kernel is told to read, so that a disk is at work while weights are packed.
READ_AHEAD_BYTES = 256 * 2**20
_SHORTEST_READ_AHEAD = 2**20  # less comes with its neighbours

Box = tuple[tuple[int, int], ...]
"""`(start, length)` of each dim."""


@dataclass(frozen=True)
class Slice:
    """What a rank keeps of a tensor: along `dim`, the `(start, length)` pieces in this order; all of the other dims."""

    dim: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        return sum(length for _, length in self.pieces)


@dataclass(frozen=True)
class LoadItem:
    """`target` (contiguous) is to hold `kept` of `source`, all of it where `kept` is None."""

    target: torch.Tensor
    source: StoredTensor
    kept: Slice | None
    name: str = ""
    """Of the parameter that `target` is, or is a part of."""


@dataclass(frozen=True)
class _Reading:
    """`view`, a box of the item's target, is to hold `kept` of `part`, all of it where `kept` is None."""

    item: LoadItem
    view: torch.Tensor
    part: StoredPart
    kept: Slice | None


def load_tensors(
    items: Iterable[LoadItem], progress: Progress, on_loaded: Callable[[LoadItem], None] = lambda _: None
) -> None:
    """Fill every target in file order, and forget it once `on_loaded` has been told of it.

    Raises:
        CheckpointError: a file ends before the bytes that its header announced, or cannot be read.
    """
    readings = [reading for item in items for reading in _readings(item)]
    readings.sort(key=lambda reading: (reading.part.file, reading.part.offset), reverse=True)
    waiting = Counter(id(reading.item) for reading in readings)
    file: Path | None = None
    descriptor = -1
    ahead = _ReadAhead(readings)
    with ExitStack() as open_file, progress.over(sum(reading.view.nbytes for reading in readings)):
        while readings:
            ahead.go_on()
            reading = readings.pop()
            item = reading.item
            try:
                if reading.part.file != file:
                    open_file.close()
                    file = reading.part.file
                    descriptor = os.open(file, os.O_RDONLY)
                    open_file.callback(os.close, descriptor)
                _fill(reading, descriptor)
            except OSError as error:
                raise CheckpointError(f"cannot read {item.source.name!r} of {file}: {error.strerror}") from None
            progress.advance(reading.view.nbytes)
            waiting[id(item)] -= 1
            if waiting[id(item)] == 0:
                on_loaded(item)


class _ReadAhead:
    """Tells the kernel what comes next of `readings`, a stack that somebody else takes from."""

    def __init__(self, readings: Sequence[_Reading]) -> None:
        self._readings = readings
        self._next = len(readings)  # all from there on were announced
        self._num_bytes = [0]  # of the first so many of the stack
        for reading in readings:
            self._num_bytes.append(self._num_bytes[-1] + reading.view.nbytes)

    def go_on(self) -> None:
        until = self._num_bytes[len(self._readings)] - READ_AHEAD_BYTES
        while self._next and self._num_bytes[self._next] > until:
            self._next -= 1
            if self._next < len(self._readings):
                _announce(self._readings[self._next])


def _announce(reading: _Reading) -> None:
    """Where the kernel takes no advice, or the file is gone, reading it comes to the same, or says so."""
    part, kept = reading.part, reading.kept
    offset, length = part.offset, part.num_bytes
    if kept is not None and kept.dim == 0 and kept.pieces:
        row = part.num_bytes // max(1, part.shape[0])
        first = min(start for start, _ in kept.pieces)
        offset, length = offset + first * row, (max(start + count for start, count in kept.pieces) - first) * row
    if length < _SHORTEST_READ_AHEAD or not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        descriptor = os.open(part.file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def refuse_nan(item: LoadItem) -> None:
    """Look through what was loaded. One sum tells where to look closely: infinite values can make it NaN too.

    Raises:
        CheckpointError: there is NaN in it.
    """
    target = item.target.detach()
    if not target.is_floating_point() or target.dtype.itemsize == 1 or not target.sum().isnan():
        return
    if any(block.isnan().any() for block in torch.split(target.view(-1), STAGING_BYTES)):
        raise CheckpointError(f"{item.source.name!r} in {item.source.file} holds NaN")


def byte_ranges(source: StoredTensor, kept: Slice | None) -> Iterator[tuple[int, int]]:
    """The `(offset, length)` byte ranges that hold `kept`: part by part, in each part in the target's own order."""
    for part, kept_of_part, _ in _cut(source, kept):
        yield from _ranges_of_part(part, source.dtype.itemsize, kept_of_part)


def _readings(item: LoadItem) -> Iterator[_Reading]:
    """At least one, which may be empty."""
    target = item.target.detach()
    assert target.is_contiguous()
    for part, kept, box in _cut(item.source, item.kept):
        view = target
        for dim, (start, length) in enumerate(box):
            view = view.narrow(dim, start, length)
        yield _Reading(item, view, part, kept)


def _cut(source: StoredTensor, kept: Slice | None) -> Iterator[tuple[StoredPart, Slice | None, Box]]:
    """What of each part is kept, and which box of the target it fills: the first dims of it, all of the others."""
    if len(source.parts) == 1:
        yield source.parts[0], kept, ()
        return
    is_empty = True
    for part in source.parts:
        whole = tuple(zip(part.corner, part.shape, strict=True))
        if kept is None:
            yield part, None, whole
            continue
        begin, size = whole[kept.dim]
        done = 0
        for start, length in kept.pieces:
            low, high = max(start, begin), min(start + length, begin + size)
            if low < high:
                own = None if high - low == size else Slice(kept.dim, ((low - begin, high - low),))
                is_empty = False
                yield part, own, (*whole[: kept.dim], (done + low - start, high - low), *whole[kept.dim + 1 :])
            done += length
    if kept is not None and is_empty:
        nothing = tuple((0, 0 if dim == kept.dim else size) for dim, size in enumerate(source.shape))
        yield source.parts[0], Slice(kept.dim, ()), nothing


def _ranges_of_part(part: StoredPart, itemsize: int, kept: Slice | None) -> Iterator[tuple[int, int]]:
    if kept is None:
        yield part.offset, part.num_bytes
        return
    inner = math.prod(part.shape[kept.dim + 1 :]) * itemsize
    outer = math.prod(part.shape[: kept.dim])
    row = part.shape[kept.dim] * inner
    for index in range(outer):
        for start, length in kept.pieces:
            yield part.offset + index * row + start * inner, length * inner


def _fill(reading: _Reading, descriptor: int) -> None:
    view, source = reading.view, reading.item.source
    ranges = _ranges_of_part(reading.part, source.dtype.itemsize, reading.kept)
    if view.device.type == "cpu" and view.dtype == source.dtype and view.is_contiguous():
        _read_ranges(descriptor, reading, ranges, _memory(view.view(-1)))
        return
    num_staged = max(1, STAGING_BYTES // source.dtype.itemsize)
    staging = torch.empty(min(num_staged, view.numel()), dtype=source.dtype)
    blocks = list(_blocks(view, num_staged))
    sizes = [block.numel() * source.dtype.itemsize for block in blocks]
    for block, part in zip(blocks, _split_ranges(ranges, sizes), strict=True):
        staged = staging[: block.numel()]
        _read_ranges(descriptor, reading, iter(part), _memory(staged))
        block.copy_(staged.view(block.shape))


def _memory(flat: torch.Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _blocks(view: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """`view` in row-major pieces of at most `limit` elements."""
    if view.is_contiguous():
        flat = view.view(-1)
        for start in range(0, len(flat), limit):
            yield flat[start : start + limit]
    elif view.numel() <= limit:
        yield view
    else:
        num_rows = max(1, limit // (view.numel() // len(view)))
        for start in range(0, len(view), num_rows):
            yield from _blocks(view[start : start + num_rows] if num_rows > 1 else view[start], limit)


def _split_ranges(ranges: Iterator[tuple[int, int]], sizes: Iterable[int]) -> Iterator[list[tuple[int, int]]]:
    """The ranges in groups of `sizes` bytes, which are all of them; long ones are cut."""
    offset, length = 0, 0
    for size in sizes:
        group: list[tuple[int, int]] = []
        room = size
        while room:
            if not length:
                offset, length = next(ranges)
            taken = min(length, room)
            group.append((offset, taken))
            offset, length, room = offset + taken, length - taken, room - taken
        yield group


def _read_ranges(descriptor: int, reading: _Reading, ranges: Iterator[tuple[int, int]], memory: memoryview) -> None:
    done = 0
    for start, total in ranges:
        offset, length = start, total
        while length:
            count = os.preadv(descriptor, [memory[done : done + length]], offset)
            if count == 0:
                raise CheckpointError(
                    f"{reading.part.file} ends before {reading.item.source.name!r} does; "
                    "it was changed while it was read"
                )
            offset, length, done = offset + count, length - count, done + count
