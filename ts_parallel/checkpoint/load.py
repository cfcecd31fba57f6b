"""Bytes of a file → this rank's parameter, and nothing else.

`preadv` straight into the parameter keeps peak memory at what is kept; a mapped file would count every page that a
column shard touches. The bytes pass through one small staging buffer, which stays in the processor's cache, where dtype
or device differ, where a stored part is no contiguous piece of the parameter, where whole rows are read for a few of
their columns, and where somebody else lays the rows down. Numbers that are computed of codes are so a block at a time
(`codes/blocks.py`). A thread goes ahead through the files, so that a disk is at work all the time.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

from ts_parallel.checkpoint.codes.blocks import CodesReader, cut_into_blocks, rows_of_codes, spans_of_rows
from ts_parallel.checkpoint.codes.integers import Read, RowIntegers
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.stored import Box, Slice, StoredPart, StoredTensor
from ts_parallel.errors import CheckpointError

STAGING_BYTES = 2 * 2**20
# What a row has beside its kept columns is read with them up to so many bytes: a call for each row takes as long.
MOST_BYTES_READ_IN_VAIN = 2**16
# So far ahead of what is being read files come into the page cache.
READ_AHEAD_BYTES = 256 * 2**20
_SHORTEST_READ_AHEAD = 2**20  # less than so much in all comes as fast without
_BYTES_A_LOOK = 2**20  # where the first of them are in the page cache, so are the others
_MOST_BYTES_AT_ONCE = 2**23


@dataclass(frozen=True)
class LoadItem:
    """`target` (contiguous) is to hold `kept` of `source`, all of it where `kept` is None."""

    target: torch.Tensor
    source: StoredTensor
    kept: Slice | None
    name: str = ""
    """Of the parameter that `target` is, or is a part of."""


@dataclass(frozen=True)
class RowItem:
    """`kept` of `source` `[O, I]`, which lies in one part or is computed, is handed to `put` a few rows at a time."""

    put: Callable[[int, torch.Tensor], None]
    """Told the number of the first row among those kept, and the rows, which are others after the call."""
    source: StoredTensor
    kept: Slice | None
    rows_at_once: int
    """Every call but the last brings a multiple of it."""

    @property
    def num_bytes(self) -> int:
        if self.kept is None:
            return self.source.num_bytes
        return self.source.num_bytes // max(1, self.source.shape[self.kept.dim]) * self.kept.length


@dataclass(frozen=True)
class IntegerItem(RowItem):
    """`put` gets the rows of which `put_integers`, told their integers and scales, says that they do not fit."""

    put_integers: Callable[[int, torch.Tensor, torch.Tensor], bool]
    """Told the number of the first row among those kept, int8 `[N, I]`, and the scales `[N, G]` of each `group`."""
    integers: RowIntegers
    """What `source` is stored as."""
    group: int


@dataclass(frozen=True)
class _Reading:
    """`view`, a box of the item's target, is to hold `kept` of `part`, all of it where `kept` is None."""

    item: LoadItem | RowItem
    view: torch.Tensor | None
    """None where rows are handed over."""
    part: StoredPart
    kept: Slice | None
    num_bytes: int
    """Of what is kept, as the target has it."""


def load_tensors(
    items: Iterable[LoadItem | RowItem], progress: Progress, on_loaded: Callable[[LoadItem], None] = lambda _: None
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
    staging = _Staging()
    num_bytes = sum(reading.num_bytes for reading in readings)
    with (
        ExitStack() as open_file,
        CodesReader() as codes,
        progress.over(num_bytes),
        _read_ahead(readings) as note_read,
    ):
        for number in range(len(readings)):
            reading = readings.pop()
            item, part = reading.item, reading.part
            try:
                if item.source.codes is not None:
                    _decode(reading, codes)
                    note_read(number, part.offset + part.num_bytes)
                else:
                    if part.file != file:
                        open_file.close()
                        file = part.file
                        descriptor = os.open(file, os.O_RDONLY)
                        open_file.callback(os.close, descriptor)
                    _fill(
                        reading, _Reader(descriptor, part.file, item.source.name, partial(note_read, number)), staging
                    )
            except OSError as error:
                raise CheckpointError(f"cannot read {item.source.name!r} of {part.file}: {error.strerror}") from None
            progress.advance(reading.num_bytes)
            waiting[id(item)] -= 1
            if waiting[id(item)] == 0 and isinstance(item, LoadItem):
                on_loaded(item)


@contextmanager
def _read_ahead(readings: Sequence[_Reading]) -> Iterator[Callable[[int, int], None]]:
    """Has a thread read ahead through `readings`, a stack that somebody else takes from.

    Yields:
        what is to be told how many readings were done before, and until which offset of its file the next one is.
    """
    spans = [(reading.part.file, *_span(reading)) for reading in reversed(readings)]
    if sum(length for _, _, length in spans) < _SHORTEST_READ_AHEAD:
        yield lambda number, offset: None
        return
    ahead = _ReadAhead(spans)
    thread = threading.Thread(target=ahead.run, name="read-ahead")
    thread.start()
    try:
        yield ahead.note_read
    finally:
        ahead.stop()
        thread.join()


def _span(reading: _Reading) -> tuple[int, int]:
    """`(offset, length)` of the bytes from the first one kept to the last."""
    part, kept = reading.part, reading.kept
    if kept is None or kept.dim or not kept.pieces or reading.item.source.codes is not None:
        return part.offset, part.num_bytes
    row = part.num_bytes // max(1, part.shape[0])
    first = min(start for start, _ in kept.pieces)
    return part.offset + first * row, (max(start + length for start, length in kept.pieces) - first) * row


class _ReadAhead:
    """Reads what comes next, once more. Owns how far it and those behind it have come.

    So the kernel reads ahead as it does for whoever reads a file from front to back: far, and in large pages. What
    `posix_fadvise` announces comes in small ones, and no more of it than the device's read-ahead at a call; to read a
    byte here and there takes the processor three times as long as to copy all of them.
    """

    def __init__(self, spans: Sequence[tuple[Path, int, int]]) -> None:
        self._spans = spans
        self._starts = list(accumulate((length for _, _, length in spans), initial=0))
        self._position = 0  # of those behind, in bytes of all spans
        self._is_wanted = True
        self._changed = threading.Condition()

    def note_read(self, number: int, offset: int) -> None:
        with self._changed:
            self._position = self._starts[number] + offset - self._spans[number][1]
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._is_wanted = False
            self._changed.notify()

    def run(self) -> None:
        bytes_read = bytearray(_BYTES_A_LOOK)  # nobody needs them here
        for begin, (file, offset, length) in zip(self._starts, self._spans, strict=False):
            try:
                descriptor = os.open(file, os.O_RDONLY)
            except OSError:
                return  # whoever needs the file will say so
            try:
                for start in range(0, length, _BYTES_A_LOOK):
                    if not self._may_go_to(begin + start):
                        return
                    if not _is_cached(descriptor, offset + start):
                        os.preadv(descriptor, [memoryview(bytes_read)[: length - start]], offset + start)
            except OSError:
                return
            finally:
                os.close(descriptor)

    def _may_go_to(self, position: int) -> bool:
        """Once the others are near; not if nothing more is wanted."""
        if position - self._position > READ_AHEAD_BYTES:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_wanted or position - self._position <= READ_AHEAD_BYTES)
        return self._is_wanted


def _is_cached(descriptor: int, offset: int) -> bool:
    """Whether a byte is in the page cache; False where the system, or the file's, does not say."""
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT))
    except (OSError, AttributeError):
        return False


def refuse_nan(item: LoadItem) -> None:
    """Look through what was loaded.

    Raises:
        CheckpointError: there is NaN in it.
    """
    refuse_nan_in(item.target.detach(), item.source)


def refuse_nan_in(values: torch.Tensor, source: StoredTensor) -> None:
    """Look through `values` of `source`. One sum tells where to look closely: infinite values can make it NaN too.

    Raises:
        CheckpointError: there is NaN in them.
    """
    if not values.is_floating_point() or values.dtype.itemsize == 1 or not values.sum().isnan():
        return
    if any(block.isnan().any() for block in _blocks(values, STAGING_BYTES)):
        raise CheckpointError(f"{source.name!r} in {source.file} holds NaN")


def byte_ranges(source: StoredTensor, kept: Slice | None) -> Iterator[tuple[int, int]]:
    """The `(offset, length)` byte ranges that hold `kept`: part by part, in each part in the target's own order."""
    assert source.codes is None, "its numbers lie nowhere"
    for part, kept_of_part, _ in _cut(source, kept):
        yield from _ranges_of_part(part, source.dtype.itemsize, kept_of_part)


def _readings(item: LoadItem | RowItem) -> Iterator[_Reading]:
    """At least one, which may be empty."""
    if isinstance(item, RowItem):
        part, *others = item.source.parts
        assert not others or item.source.codes is not None
        yield _Reading(item, None, part, item.kept, item.num_bytes)
        return
    target = item.target.detach()
    assert target.is_contiguous()
    if item.source.codes is not None:
        yield _Reading(item, target, item.source.parts[0], item.kept, target.nbytes)
        return
    for part, kept, box in _cut(item.source, item.kept):
        view = target
        for dim, (start, length) in enumerate(box):
            view = view.narrow(dim, start, length)
        yield _Reading(item, view, part, kept, view.nbytes)


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


class _Staging:
    """Owns one buffer, which grows to what was asked for at most."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        num_bytes = num_elements * dtype.itemsize
        if num_bytes > len(self._buffer):
            self._buffer = torch.empty(max(num_bytes, STAGING_BYTES), dtype=torch.uint8)
        return self._buffer[:num_bytes].view(dtype)


@dataclass(frozen=True)
class _Reader:
    """Reads bytes of one tensor from an open file."""

    descriptor: int
    file: Path
    name: str
    """Of the tensor."""
    note_read: Callable[[int], None]
    """Told until which offset."""

    def read(self, ranges: Iterable[tuple[int, int]], target: torch.Tensor) -> None:
        """Fill `target`, contiguous on the CPU, with what lies in the `(offset, length)` ranges."""
        memory = target.view(-1).view(torch.uint8).numpy().data
        done = 0
        for start, total in ranges:
            offset, length = start, total
            while length:
                count = os.preadv(self.descriptor, [memory[done : done + min(length, _MOST_BYTES_AT_ONCE)]], offset)
                if count == 0:
                    raise CheckpointError(
                        f"{self.file} ends before {self.name!r} does; it was changed while it was read"
                    )
                offset, length, done = offset + count, length - count, done + count
                self.note_read(offset)


def _decode(reading: _Reading, codes: CodesReader) -> None:
    item = reading.item
    if isinstance(item, IntegerItem):
        _hand_over_integers(item, codes.read)
        return
    if isinstance(item, RowItem):
        for first, rows in rows_of_codes(item.source, item.kept, item.rows_at_once, codes.read):
            item.put(first, rows)
        return
    assert reading.view is not None
    for place, box in cut_into_blocks(item.source, item.kept):
        view = reading.view
        for dim, (start, length) in enumerate(place):
            view = view.narrow(dim, start, length)
        view.copy_(codes.read(item.source, box))


def _hand_over_integers(item: IntegerItem, read: Read) -> None:
    for first, spans, (columns,) in spans_of_rows(item.source.shape, item.kept, item.rows_at_once):
        integers = torch.cat([read(item.integers.integers, (span, columns)) for span in spans])
        scales = torch.cat([item.integers.read_scales(span, columns, item.group, read) for span in spans])
        if item.put_integers(first, integers, scales):
            continue
        numbers = torch.cat([read(item.source, (span, columns)) for span in spans])
        for at in range(0, len(integers), item.rows_at_once):
            own = slice(at, at + item.rows_at_once)
            if not item.put_integers(first + at, integers[own], scales[own]):
                item.put(first + at, numbers[own])


def _fill(reading: _Reading, reader: _Reader, staging: _Staging) -> None:
    view, item, kept = reading.view, reading.item, reading.kept
    if isinstance(item, RowItem):
        for first, rows in _rows(reading, reader, staging, item.rows_at_once):
            item.put(first, rows)
        return
    assert view is not None
    dtype = item.source.dtype
    if kept is not None and view.is_contiguous() and _takes_whole_rows(reading.part, kept, dtype.itemsize):
        target = view.view(-1, *view.shape[kept.dim :])
        for first, rows in _rows(reading, reader, staging, 1):
            target[first : first + len(rows)].copy_(rows)
        return
    ranges = _ranges_of_part(reading.part, dtype.itemsize, kept)
    if view.device.type == "cpu" and view.dtype == dtype and view.is_contiguous():
        reader.read(ranges, view)
        return
    num_staged = max(1, STAGING_BYTES // dtype.itemsize)
    blocks = list(_blocks(view, num_staged))
    sizes = [block.numel() * dtype.itemsize for block in blocks]
    for block, part in zip(blocks, _split_ranges(ranges, sizes), strict=True):
        staged = staging.take(block.numel(), dtype)
        reader.read(part, staged)
        block.copy_(staged.view(block.shape))


def _takes_whole_rows(part: StoredPart, kept: Slice, itemsize: int) -> bool:
    """Whether what lies between the kept pieces is read too."""
    row = math.prod(part.shape[kept.dim :]) * itemsize
    own = row // max(1, part.shape[kept.dim]) * kept.length
    is_cut = math.prod(part.shape[: kept.dim]) > 1 and 0 < own < row
    return is_cut and row <= STAGING_BYTES and row - own <= MOST_BYTES_READ_IN_VAIN * len(kept.pieces)


def _rows(
    reading: _Reading, reader: _Reader, staging: _Staging, rows_at_once: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """The kept rows in groups of a multiple of `rows_at_once`, each with the number of its first.

    Rows are what all dims before the kept one count, or the first dim. Of their columns those kept are given.
    """
    part, kept, dtype = reading.part, reading.kept, reading.item.source.dtype
    columns = kept if kept is not None and kept.dim > 0 else None
    split = columns.dim if columns is not None else 1
    shape = part.shape[split:]
    width = math.prod(shape)
    num_rows = math.prod(part.shape[:split]) if kept is None or columns is not None else kept.length
    row_bytes = width * dtype.itemsize
    step = max(1, STAGING_BYTES // (row_bytes * rows_at_once)) * rows_at_once
    firsts = range(0, num_rows, step)
    ranges = _ranges_of_part(part, dtype.itemsize, None if columns is not None else kept)
    sizes = [min(step, num_rows - first) * row_bytes for first in firsts]
    for first, size, own in zip(firsts, sizes, _split_ranges(ranges, sizes), strict=True):
        rows = staging.take(size // dtype.itemsize, dtype)
        reader.read(own, rows)
        rows = rows.view(-1, *shape)
        if columns is not None:
            kept_columns = [rows.narrow(1, start, length) for start, length in columns.pieces]
            rows = kept_columns[0] if len(kept_columns) == 1 else torch.cat(kept_columns, dim=1)
        yield first, rows


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
