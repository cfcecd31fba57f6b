"""ggml's blocks of codes as numbers: each type's own layout, in float32 as gguf's `quants.dequantize` computes them.

N blocks. A block's bytes come as uint8 `[..., N, bytes]`, its numbers go as float32 `[..., N, numbers]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ts_parallel.checkpoint.codes.integers import Read, RowIntegers
from ts_parallel.checkpoint.stored import Box, StoredTensor


@dataclass(frozen=True)
class BlockType:
    name: str
    size: int
    """Numbers of a block."""
    num_bytes: int
    decode: Callable[[torch.Tensor], torch.Tensor]
    num_bits: int = 0
    """Of its integers, where its numbers are those times the float16 number that it begins with."""
    integers: Callable[[torch.Tensor], torch.Tensor] = lambda octets: octets
    """Those, as int8."""


def _half(octets: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 number at a byte `[..., N, 1]`."""
    return octets[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(octets: torch.Tensor) -> torch.Tensor:
    """All the lower halves, then all the upper ones."""
    return torch.cat((octets & 15, octets >> 4), dim=-1)


def _fifth_bits(octets: torch.Tensor, at: int) -> torch.Tensor:
    """Of 32 numbers, at the place that it has in them."""
    bits = (octets[..., at : at + 4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(-2) << 4


def _integers_of_q4_0(octets: torch.Tensor) -> torch.Tensor:
    return _nibbles(octets[..., 2:]).to(torch.int8) - 8


def _q4_0(octets: torch.Tensor) -> torch.Tensor:
    return _half(octets, 0) * _integers_of_q4_0(octets).float()


def _q4_1(octets: torch.Tensor) -> torch.Tensor:
    return _half(octets, 0) * _nibbles(octets[..., 4:]).float() + _half(octets, 2)


def _integers_of_q5_0(octets: torch.Tensor) -> torch.Tensor:
    return (_nibbles(octets[..., 6:]) | _fifth_bits(octets, 2)).to(torch.int8) - 16


def _q5_0(octets: torch.Tensor) -> torch.Tensor:
    return _half(octets, 0) * _integers_of_q5_0(octets).float()


def _q5_1(octets: torch.Tensor) -> torch.Tensor:
    numbers = (_nibbles(octets[..., 8:]) | _fifth_bits(octets, 4)).float()
    return _half(octets, 0) * numbers + _half(octets, 2)


def _integers_of_q8_0(octets: torch.Tensor) -> torch.Tensor:
    return octets[..., 2:].contiguous().view(torch.int8)


def _q8_0(octets: torch.Tensor) -> torch.Tensor:
    return _half(octets, 0) * _integers_of_q8_0(octets).float()


def _pairs_of_bits(octets: torch.Tensor) -> torch.Tensor:
    """`[..., 64]` → `[..., 16, 16]`: of each half of the bytes the lowest two bits, then the next, in sixteens."""
    halves = octets.unflatten(-1, (2, 1, 32))  # type: ignore[no-untyped-call]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
    pairs: torch.Tensor = (halves >> shifts) & 3
    return pairs.flatten(-3).view(*octets.shape[:-1], 16, 16)


def _by_sub_block(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return scales.unsqueeze(-1) * numbers


def _q2_k(octets: torch.Tensor) -> torch.Tensor:
    scales, numbers = octets[..., :16], _pairs_of_bits(octets[..., 16:80]).float()
    steps, lows = _half(octets, 80) * (scales & 15).float(), _half(octets, 82) * (scales >> 4).float()
    return (_by_sub_block(numbers, steps) - lows.unsqueeze(-1)).flatten(-2)


def _q3_k(octets: torch.Tensor) -> torch.Tensor:
    high, packed = octets[..., :32], octets[..., 96:108]
    bits = (high.unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8).unsqueeze(1)) & 1  # [..., 8, 32]
    numbers = _pairs_of_bits(octets[..., 32:96]).float() - 4 * (1 - bits.float()).flatten(-2).view(
        *bits.shape[:-2], 16, 16
    )
    low4 = _nibbles(packed[..., :8])
    high2 = ((packed[..., 8:].unsqueeze(-2) >> torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(1)) & 3).flatten(-2)
    scales = (low4 | (high2 << 4)).float() - 32
    return _by_sub_block(numbers, _half(octets, 108) * scales).flatten(-2)


def _six_bit_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Q4_K and Q5_K, twelve bytes → eight steps and eight lows."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    steps = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=-1)
    lows = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=-1)
    return steps.float(), lows.float()


def _nibbles_of_k(octets: torch.Tensor) -> torch.Tensor:
    """`[..., 128]` → `[..., 8, 32]`: of each 32 bytes the lower halves, then the upper ones."""
    return _nibbles(octets.unflatten(-1, (4, 32))).view(*octets.shape[:-1], 8, 32)  # type: ignore[no-untyped-call]


def _q4_k(octets: torch.Tensor) -> torch.Tensor:
    steps, lows = _six_bit_scales(octets[..., 4:16])
    numbers = _nibbles_of_k(octets[..., 16:]).float()
    lows = _half(octets, 2) * lows
    return (_by_sub_block(numbers, _half(octets, 0) * steps) - lows.unsqueeze(-1)).flatten(-2)


def _q5_k(octets: torch.Tensor) -> torch.Tensor:
    steps, lows = _six_bit_scales(octets[..., 4:16])
    bits = (octets[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8).unsqueeze(1)) & 1
    numbers = (_nibbles_of_k(octets[..., 48:]) | (bits << 4)).float()
    lows = _half(octets, 2) * lows
    return (_by_sub_block(numbers, _half(octets, 0) * steps) - lows.unsqueeze(-1)).flatten(-2)


def _q6_k(octets: torch.Tensor) -> torch.Tensor:
    low = octets[..., :128].unflatten(-1, (2, 64))  # type: ignore[no-untyped-call]
    low4 = _nibbles(low).flatten(-2)
    high = octets[..., 128:192].unflatten(-1, (2, 1, 32))  # type: ignore[no-untyped-call]
    high2 = ((high >> torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(1)) & 3).flatten(-3)
    numbers = (low4 | (high2 << 4)).float() - 32
    scales = octets[..., 192:208].contiguous().view(torch.int8).float()
    return _by_sub_block(numbers.view(*numbers.shape[:-1], 16, 16), _half(octets, 208) * scales).flatten(-2)


PLAIN: Mapping[int, torch.dtype] = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""ggml's number of a type → the dtype that it is."""

BLOCKS: Mapping[int, BlockType] = {
    2: BlockType("Q4_0", 32, 18, _q4_0, 4, _integers_of_q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0, 5, _integers_of_q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0, 8, _integers_of_q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
}

# Of types that are not read, so that the line which says so can name them.
OTHERS: Mapping[int, str] = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"},
    **{22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"},
    39: "MXFP4",
}


@dataclass(frozen=True)
class GgmlBlocks:
    """The numbers of a tensor whose last dim lies in blocks."""

    octets: StoredTensor
    """uint8 `[..., bytes of a row]`"""
    kind: int

    @property
    def cut_order(self) -> tuple[int, ...]:
        return tuple(range(len(self.octets.shape)))

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        return self._numbers(box, read, BLOCKS[self.kind].decode)

    def row_integers(self, read: Read) -> RowIntegers | None:
        own = BLOCKS[self.kind]
        if not own.num_bits:
            return None
        rows, width = self.octets.shape[0], self.octets.shape[1] // own.num_bytes
        whole = StoredTensor(self.octets.name, torch.int8, (rows, width * own.size), self.octets.parts)
        integers = replace(whole, codes=_IntegersOfBlocks(self.octets, self.kind))
        scales = replace(whole, dtype=torch.float16, shape=(rows, width), codes=_ScalesOfBlocks(self.octets, self.kind))
        return RowIntegers(own.num_bits, integers, scales, own.size)

    def _numbers(self, box: Box, read: Read, decode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        own = BLOCKS[self.kind]
        start, length = box[-1]
        first, end = start // own.size, -(-(start + length) // own.size)
        numbers = decode(self._blocks((*box[:-1], (first, end - first)), read)).flatten(-2)
        return numbers.narrow(-1, start - first * own.size, length)

    def _blocks(self, box: Box, read: Read) -> torch.Tensor:
        """The bytes `[..., N, bytes]` of a box whose last dim counts blocks."""
        *others, (first, count) = box
        size = BLOCKS[self.kind].num_bytes
        octets = read(self.octets, (*others, (first * size, count * size)))
        return octets.view(*octets.shape[:-1], count, size)


@dataclass(frozen=True)
class _IntegersOfBlocks(GgmlBlocks):
    def decode(self, box: Box, read: Read) -> torch.Tensor:
        return self._numbers(box, read, BLOCKS[self.kind].integers)


@dataclass(frozen=True)
class _ScalesOfBlocks(GgmlBlocks):
    def decode(self, box: Box, read: Read) -> torch.Tensor:
        return self._blocks(box, read)[..., :2].contiguous().view(torch.float16).squeeze(-1)
