"""MXFP4 as gpt-oss stores its experts: numbers of four bits, 32 of which share a power of two.

`X_blocks` `[E, O, I / 32, 16]` holds two numbers a byte, the first in the lower half, `X_scales` `[E, O, I / 32]` the
exponents plus 127. The model has them as `X` `[E, I, O]` (OCP Microscaling Formats, version 1.0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ts_parallel.checkpoint.codes.integers import Read
from ts_parallel.checkpoint.codes.kinds.scheme import Made, lacks, made, misfit, refuse_unknown
from ts_parallel.checkpoint.stored import Box, CheckpointIndex, StoredTensor

_BLOCK = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_KNOWN: dict[str, tuple[Any, ...] | None] = dict.fromkeys(("quant_method", "modules_to_not_convert", "dequantize"))


@dataclass(frozen=True)
class Mxfp4:
    @staticmethod
    def parse(section: Mapping[str, Any], said: str) -> Mxfp4:
        refuse_unknown(section, _KNOWN, said)
        return Mxfp4()

    def make(self, index: CheckpointIndex, dtype: torch.dtype) -> Iterator[Made]:
        for name, blocks in index.items():
            if not name.endswith("_blocks"):
                continue
            weight = name.removesuffix("_blocks")
            scales = index.get(f"{weight}_scales")
            if scales is None:
                raise lacks(blocks, f"{weight}_scales")
            if blocks.dtype != torch.uint8 or len(blocks.shape) != 4 or blocks.shape[3] * 2 != _BLOCK:
                raise misfit(blocks, None, weight)
            if scales.dtype != torch.uint8 or scales.shape != blocks.shape[:3]:
                raise misfit(scales, blocks.shape[:3], weight)
            experts, outputs, groups, _ = blocks.shape
            shape = (experts, groups * _BLOCK, outputs)
            yield made(weight, dtype, shape, _Experts(blocks, scales), blocks, scales.name)

    def __str__(self) -> str:
        return "MXFP4"


@dataclass(frozen=True)
class _Experts:
    """`[E, I, O]`"""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def cut_order(self) -> tuple[int, ...]:
        return (0, 2, 1)

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        experts, (start, length), outputs = box
        first = start // _BLOCK
        groups = first, (start + length - 1) // _BLOCK - first + 1
        octets = read(self.blocks, (experts, outputs, groups, (0, _BLOCK // 2)))
        exponents = read(self.scales, (experts, outputs, groups)).int() - 127
        codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2).int()
        values = torch.tensor((*_VALUES, *(-value for value in _VALUES)), dtype=torch.bfloat16)
        numbers = torch.ldexp(values[codes], exponents.unsqueeze(-1)).flatten(-2)
        return numbers.narrow(-1, start - first * _BLOCK, length).mT
