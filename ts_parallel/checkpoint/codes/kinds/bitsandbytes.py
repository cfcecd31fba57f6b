"""bitsandbytes: rows of int8 with a largest number each, or numbers of four bits looked up in a table of sixteen.

Of four bits `X.weight` holds two numbers a byte, the first in the upper half, row after row; blocks of them share a
largest number in `X.weight.absmax`, which may itself be codes of eight bits, with a table, largest numbers and an
offset of their own (double quantisation). `X.weight.quant_state.bitsandbytes__nf4` holds sizes and dtypes as JSON
(https://github.com/bitsandbytes-foundation/bitsandbytes, `QuantState`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ts_parallel.checkpoint.codes.blocks import read_whole
from ts_parallel.checkpoint.codes.integers import Read, RowIntegers
from ts_parallel.checkpoint.codes.kinds.scheme import INSTEAD, Made, lacks, made, misfit, refuse_unknown
from ts_parallel.checkpoint.stored import Box, CheckpointIndex, StoredTensor
from ts_parallel.errors import CheckpointError

_STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_LONGEST_STATE = 2**16
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INVERSE_OF_127 = 7.874015718698502e-3  # as bitsandbytes has it
_KNOWN: dict[str, tuple[Any, ...] | None] = dict.fromkeys(
    (
        *("quant_method", "load_in_8bit", "load_in_4bit", "_load_in_8bit", "_load_in_4bit", "llm_int8_threshold"),
        *("llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
        *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
        *("target_parameters", "modules_to_not_convert"),
    )
)


@dataclass(frozen=True)
class BitsAndBytes:
    num_bits: int

    @staticmethod
    def parse(section: Mapping[str, Any], said: str) -> BitsAndBytes:
        refuse_unknown(section, _KNOWN, said)
        return BitsAndBytes(4 if section.get("load_in_4bit") or section.get("_load_in_4bit") else 8)

    def make(self, index: CheckpointIndex, dtype: torch.dtype) -> Iterator[Made]:
        for name, stored in index.items():
            if (state := _STATE.fullmatch(name)) is not None:
                yield _of_four_bits(state["weight"], stored, index, dtype)
            elif name.endswith(".weight") and stored.dtype == torch.int8:
                yield _of_eight_bits(name, stored, index, dtype)

    def __str__(self) -> str:
        return f"numbers of {self.num_bits} bits of bitsandbytes"


def _of_eight_bits(name: str, stored: StoredTensor, index: CheckpointIndex, dtype: torch.dtype) -> Made:
    module = name.removesuffix(".weight")
    largest, form = index.get(f"{module}.SCB"), index.get(f"{module}.weight_format")
    if largest is None:
        raise lacks(stored, f"{module}.SCB")
    if len(stored.shape) != 2 or math.prod(largest.shape) != stored.shape[0]:
        raise misfit(largest, (stored.shape[0],), name)
    if form is not None and form.dtype == torch.uint8 and read_whole(form).any():
        raise CheckpointError(f"{form.file} says by {form.name!r} that {name!r} does not lie row by row: {INSTEAD}")
    uses = [each.name for each in (largest, form) if each is not None]
    return made(name, dtype, stored.shape, _RowsOfInt8(stored, largest), stored, *uses)


@dataclass(frozen=True)
class _RowsOfInt8:
    numbers: StoredTensor
    """`[O, I]`"""
    largest: StoredTensor
    """`[O]`, the largest absolute value of each row."""

    @property
    def cut_order(self) -> tuple[int, ...]:
        return (0, 1)

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        rows = box[0]
        whole = read(self.largest, tuple((0, size) for size in self.largest.shape)).view(-1).float()
        return read(self.numbers, box) * whole.narrow(0, *rows).unsqueeze(1) * _INVERSE_OF_127

    def row_integers(self, read: Read) -> RowIntegers:
        rows, columns = self.numbers.shape
        scales = StoredTensor(
            self.largest.name, torch.float32, (rows, 1), self.largest.parts, _StepsOfRows(self.largest)
        )
        return RowIntegers(8, self.numbers, scales, columns)


@dataclass(frozen=True)
class _StepsOfRows:
    """`[O, 1]`"""

    largest: StoredTensor

    @property
    def cut_order(self) -> tuple[int, ...]:
        return (0, 1)

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        whole = read(self.largest, tuple((0, size) for size in self.largest.shape)).view(-1, 1).float()
        return whole.narrow(0, *box[0]) * _INVERSE_OF_127


def _of_four_bits(name: str, state: StoredTensor, index: CheckpointIndex, dtype: torch.dtype) -> Made:
    stored = index.get(name)
    beside = {end: index.get(f"{name}.{end}") for end in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    if stored is None:
        raise lacks(state, name)
    absmax, table = beside["absmax"], beside["quant_map"]
    if absmax is None or table is None:
        raise lacks(stored, f"{name}.{'absmax' if absmax is None else 'quant_map'}")
    said = _read_state(state)
    shape, block = said["shape"], said["blocksize"]
    num_blocks = -(-math.prod(shape) // block)
    if math.prod(absmax.shape) != num_blocks or math.prod(table.shape) != 16:
        raise misfit(absmax, (num_blocks,), name)
    if stored.dtype.itemsize != 1 or stored.num_bytes != -(-math.prod(shape) // 2):
        raise misfit(stored, None, name)
    largest = StoredTensor(absmax.name, torch.float32, (num_blocks,), absmax.parts, _nested(absmax, beside, said, name))
    codes = _TableOfSixteen(stored, largest, table, shape, block, said["dtype"])
    uses = [each.name for each in (state, *beside.values()) if each is not None]
    return made(name, dtype, shape, codes, stored, *uses)


def _read_state(state: StoredTensor) -> dict[str, Any]:
    try:
        if state.num_bytes > _LONGEST_STATE or state.dtype != torch.uint8:
            raise ValueError("no text")
        said = json.loads(bytes(read_whole(state).view(-1).tolist()))
        sizes = [*said["shape"], said["blocksize"], said.get("nested_blocksize", 1)]
        if len(said["shape"]) != 2 or any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"shape {said['shape']}")
        return {
            **said,
            "shape": tuple(said["shape"]),
            "dtype": _DTYPES[said["dtype"]],
            "nested_offset": float(said.get("nested_offset", 0.0)),
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{state.name!r} in {state.file} is no state of bitsandbytes: {error!r}") from None


def _nested(
    absmax: StoredTensor, beside: Mapping[str, StoredTensor | None], said: Mapping[str, Any], name: str
) -> _Flat | _TableOf256:
    largest, table = beside["nested_absmax"], beside["nested_quant_map"]
    if absmax.dtype.is_floating_point:
        return _Flat(absmax)
    block = said.get("nested_blocksize", 0)
    if largest is None or table is None or not block:
        raise lacks(absmax, f"{name}.nested_absmax")
    if absmax.dtype != torch.uint8 or math.prod(table.shape) != 256:
        raise misfit(absmax, None, name)
    return _TableOf256(absmax, largest, table, block, said["nested_offset"])


@dataclass(frozen=True)
class _Flat:
    """What is stored, as one row of float32."""

    stored: StoredTensor

    @property
    def cut_order(self) -> tuple[int, ...]:
        return (0,)

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        return _flat(self.stored, box[0], read).float()


@dataclass(frozen=True)
class _TableOf256:
    """`table[code] · largest + offset`, blocks of which share a largest number."""

    numbers: StoredTensor
    largest: StoredTensor
    table: StoredTensor
    block: int
    offset: float

    @property
    def cut_order(self) -> tuple[int, ...]:
        return (0,)

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        ((start, length),) = box
        codes = _flat(self.numbers, box[0], read).long()
        table = _flat(self.table, (0, 256), read).float()
        blocks = torch.arange(start, start + length) // self.block
        first = start // self.block
        count = (start + length - 1) // self.block - first + 1
        return table[codes] * _flat(self.largest, (first, count), read).float()[blocks - first] + self.offset


@dataclass(frozen=True)
class _TableOfSixteen:
    """`table[code] · largest`, two codes a byte, blocks of which share a largest number, row after row."""

    numbers: StoredTensor
    largest: StoredTensor
    """float32, one of each block."""
    table: StoredTensor
    shape: tuple[int, int]
    block: int
    dtype: torch.dtype

    @property
    def cut_order(self) -> tuple[int, ...]:
        return (0, 1)

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        (row, num_rows), (column, num_columns) = box
        width = self.shape[1]
        start, length = row * width, num_rows * width
        low = start // 2
        count = (start + length + 1) // 2 - low
        octets = _flat(self.numbers, (low, count), read).view(torch.uint8)
        codes = torch.stack((octets >> 4, octets & 15), dim=1).view(-1).narrow(0, start - 2 * low, length)
        first = start // self.block
        blocks = torch.arange(start, start + length) // self.block - first
        largest = read(self.largest, ((first, int(blocks[-1]) + 1),))
        numbers = _flat(self.table, (0, 16), read).float()[codes.long()] * largest[blocks]
        return numbers.to(self.dtype).view(num_rows, width).narrow(1, column, num_columns)


def _flat(stored: StoredTensor, span: tuple[int, int], read: Read) -> torch.Tensor:
    """The elements from `span[0]` on of a tensor of which one dim alone is long, wherever that is."""
    long = [dim for dim, size in enumerate(stored.shape) if size > 1] or [0]
    if len(long) > 1:
        raise misfit(stored, None, stored.name)
    box = tuple(span if dim == long[0] else (0, 1) for dim in range(len(stored.shape)))
    return read(stored, box).reshape(-1)
