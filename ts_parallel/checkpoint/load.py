"""Bytes of a file → this rank's parameter, and nothing else: only the kept byte ranges are read.

`preadv` straight into the parameter keeps peak memory at what is kept; a mapped file would count every page that a
column shard touches. Where dtype or device differ, the bytes pass through one small staging buffer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ts_parallel.checkpoint.index import StoredTensor
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.errors import CheckpointError

STAGING_BYTES = 8 * 2**20


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


def load_tensors(
    items: Iterable[LoadItem], progress: Progress, on_loaded: Callable[[LoadItem], None] = lambda _: None
) -> None:
    """Fill every target in file order, and forget it once `on_loaded` has been told of it.

    Raises:
        CheckpointError: a file ends before the bytes that its header announced, or cannot be read.
    """
    ordered = sorted(items, key=lambda item: (item.source.file, item.source.offset), reverse=True)
    with ExitStack() as stack, progress.over(sum(item.target.nbytes for item in ordered)):
        descriptors: dict[Path, int] = {}
        while ordered:
            item = ordered.pop()
            file = item.source.file
            try:
                if file not in descriptors:
                    descriptors[file] = os.open(file, os.O_RDONLY)
                    stack.callback(os.close, descriptors[file])
                _fill(item, descriptors[file])
            except OSError as error:
                raise CheckpointError(f"cannot read {item.source.name!r} of {file}: {error.strerror}") from None
            progress.advance(item.target.nbytes)
            on_loaded(item)


def byte_ranges(source: StoredTensor, kept: Slice | None) -> Iterator[tuple[int, int]]:
    """The `(offset, length)` byte ranges of a file that hold `kept`, in the target's own order."""
    if kept is None:
        yield source.offset, source.num_bytes
        return
    inner = torch.Size(source.shape[kept.dim + 1 :]).numel() * source.dtype.itemsize
    outer = torch.Size(source.shape[: kept.dim]).numel()
    row = source.shape[kept.dim] * inner
    for index in range(outer):
        for start, length in kept.pieces:
            yield source.offset + index * row + start * inner, length * inner


def _fill(item: LoadItem, descriptor: int) -> None:
    target, source = item.target.detach(), item.source
    assert target.is_contiguous()
    flat = target.view(-1)
    if target.device.type == "cpu" and target.dtype == source.dtype:
        _read_ranges(descriptor, source, byte_ranges(source, item.kept), _memory(flat))
        return
    staging = torch.empty(min(STAGING_BYTES // source.dtype.itemsize, flat.numel()), dtype=source.dtype)
    ranges, done = byte_ranges(source, item.kept), 0
    for part in _split_ranges(ranges, staging.nbytes):
        num_bytes = sum(length for _, length in part)
        _read_ranges(descriptor, source, iter(part), _memory(staging)[:num_bytes])
        count = num_bytes // source.dtype.itemsize
        flat[done : done + count].copy_(staging[:count])
        done += count


def _memory(flat: torch.Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _split_ranges(ranges: Iterator[tuple[int, int]], limit: int) -> Iterator[list[tuple[int, int]]]:
    """The ranges in groups of at most `limit` bytes, long ones cut."""
    group: list[tuple[int, int]] = []
    room = limit
    for start, total in ranges:
        offset, length = start, total
        while length:
            taken = min(length, room)
            group.append((offset, taken))
            offset, length, room = offset + taken, length - taken, room - taken
            if room == 0:
                yield group
                group, room = [], limit
    if group:
        yield group


def _read_ranges(descriptor: int, source: StoredTensor, ranges: Iterator[tuple[int, int]], memory: memoryview) -> None:
    done = 0
    for start, total in ranges:
        offset, length = start, total
        while length:
            count = os.preadv(descriptor, [memory[done : done + length]], offset)
            if count == 0:
                raise CheckpointError(
                    f"{source.file} ends before {source.name!r} does; it was changed while it was read"
                )
            offset, length, done = offset + count, length - count, done + count
