"""A GGUF file's tensors under the names, and in the order of numbers, that transformers' model has them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ts_parallel.checkpoint.codes.integers import Read
from ts_parallel.checkpoint.codes.kinds.numbers import Transposed
from ts_parallel.checkpoint.codes.rows import PairedRows
from ts_parallel.checkpoint.gguf.blocks import BLOCKS, OTHERS, PLAIN, GgmlBlocks
from ts_parallel.checkpoint.gguf.header import GgufHeader, GgufTensor, check_ends, read_header
from ts_parallel.checkpoint.gguf.names import ROPE_FREQUENCIES, Change, architecture_of, name_of
from ts_parallel.checkpoint.stored import Box, StoredTensor, stored_whole
from ts_parallel.errors import CheckpointError

NOMINAL = torch.bfloat16
"""What numbers that are computed of blocks are said to be: a GGUF file names no dtype."""


def read_gguf(file: Path) -> Iterator[StoredTensor]:
    """
    Raises:
        CheckpointError: it is cut off or no GGUF file, of an architecture that is not known here, or holds a tensor of
            another type, or one without a place in its model.
    """
    header = read_header(file)
    architecture = architecture_of(header)
    check_ends(header, {tensor.name: _num_bytes(header, tensor) for tensor in header.tensors})
    for tensor in header.tensors:
        if tensor.name == ROPE_FREQUENCIES:
            continue
        named = name_of(tensor.name, architecture, file)
        stored = _stored(header, tensor, named.name)
        if named.change is Change.EXPERTS:
            for expert in range(tensor.shape[0]):
                part = replace(
                    tensor,
                    shape=tensor.shape[1:],
                    offset=tensor.offset + expert * _num_bytes(header, tensor) // tensor.shape[0],
                )
                yield _stored(header, part, named.name.format(expert=expert))
        elif named.change is Change.NONE:
            yield stored
        elif named.change is Change.ONE_ROW:
            yield _stored(header, replace(tensor, shape=(1, *tensor.shape)), named.name)
        else:
            yield _changed(stored, named.change, header)


def _num_bytes(header: GgufHeader, tensor: GgufTensor) -> int:
    if tensor.kind in PLAIN:
        return math.prod(tensor.shape) * PLAIN[tensor.kind].itemsize
    own = BLOCKS.get(tensor.kind)
    if own is None:
        known = ", ".join(
            [str(dtype).removeprefix("torch.") for dtype in PLAIN.values()] + [each.name for each in BLOCKS.values()]
        )
        raise CheckpointError(
            f"{tensor.name!r} in {header.file} is of ggml's type {OTHERS.get(tensor.kind, tensor.kind)}; {known} are "
            "read: take the file in one of those"
        )
    if not tensor.shape or tensor.shape[-1] % own.size:
        raise CheckpointError(
            f"{tensor.name!r} in {header.file} of shape {list(tensor.shape)} is in no blocks of {own.size}"
        )
    return math.prod(tensor.shape) // own.size * own.num_bytes


def _stored(header: GgufHeader, tensor: GgufTensor, name: str) -> StoredTensor:
    if tensor.kind in PLAIN:
        return stored_whole(name, header.file, PLAIN[tensor.kind], tensor.shape, tensor.offset)
    own = BLOCKS[tensor.kind]
    shape = (*tensor.shape[:-1], tensor.shape[-1] // own.size * own.num_bytes)
    octets = stored_whole(name, header.file, torch.uint8, shape, tensor.offset)
    return StoredTensor(name, NOMINAL, tensor.shape, octets.parts, GgmlBlocks(octets, tensor.kind), f"GGUF {own.name}")


def _changed(stored: StoredTensor, change: Change, header: GgufHeader) -> StoredTensor:
    codes: Any
    shape = stored.shape
    if change is Change.TRANSPOSED:
        codes, shape = Transposed(stored), tuple(reversed(stored.shape))
    elif change is Change.ONE_ADDED:
        codes = _OneAdded(stored)
    else:
        key = "attention.head_count_kv" if change is Change.KEY_ROWS else "attention.head_count"
        values = header.values
        heads = values.get(f"{header.architecture}.{key}", values.get(f"{header.architecture}.attention.head_count"))
        if type(heads) is not int or heads < 1 or stored.shape[0] % (2 * heads):
            raise CheckpointError(f"{header.file} says {key} {heads!r}, and {stored.name!r} has shape {list(shape)}")
        codes = PairedRows(stored, stored.shape[0] // heads)
    return StoredTensor(stored.name, stored.dtype, shape, stored.parts, codes, stored.form)


@dataclass(frozen=True)
class _OneAdded:
    """To each number of `source`, in float32."""

    source: StoredTensor

    @property
    def cut_order(self) -> tuple[int, ...]:
        return tuple(range(len(self.source.shape)))

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        return read(self.source, box).float() - 1
