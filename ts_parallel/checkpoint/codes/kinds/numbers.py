"""Numbers times scales of a grid, and small integers out of wider ones: what most formats are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ts_parallel.checkpoint.codes.integers import Read, RowIntegers
from ts_parallel.checkpoint.stored import Box, StoredTensor


@dataclass(frozen=True)
class ScaledNumbers:
    """`(number - zero) · scale`, of which blocks share a scale: the last of a dim may be shorter."""

    numbers: StoredTensor
    scales: StoredTensor
    """Has as many dims as the numbers, or fewer: those at its front are theirs, and one element is for all."""
    block: tuple[int, ...]
    """Along each dim of the numbers; of one without blocks its whole size."""
    dtype: torch.dtype
    """What is computed in, and what comes out."""
    zeros: StoredTensor | None = None
    """Of the scales' shape."""

    @property
    def cut_order(self) -> tuple[int, ...]:
        return tuple(range(len(self.numbers.shape)))

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        numbers = read(self.numbers, box).to(self.dtype)
        if self.zeros is not None:
            numbers = numbers - self._spread(read(self.zeros, self._cells(self.zeros, box)), box)
        return numbers * self._spread(read(self.scales, self._cells(self.scales, box)), box)

    def row_integers(self, read: Read) -> RowIntegers | None:
        are_of_rows = len(self.scales.shape) == 2 and self.scales.shape[0] == self.numbers.shape[0]
        if self.numbers.dtype != torch.int8 or not are_of_rows or self.block[0] != 1:
            return None
        if self.zeros is not None and read(self.zeros, tuple((0, size) for size in self.zeros.shape)).any():
            return None
        num_bits = self.numbers.codes.bits if isinstance(self.numbers.codes, PackedIntegers) else 8
        return RowIntegers(num_bits, self.numbers, self.scales, self.block[1])

    def _cells(self, grid: StoredTensor, box: Box) -> Box:
        """Those of the grid that `box` touches."""
        if len(grid.shape) == 0 or grid.shape == (1,):
            return tuple((0, size) for size in grid.shape)
        cells = []
        for dim in range(len(grid.shape)):
            start, length = box[dim]
            first = start // self.block[dim]
            cells.append((first, (start + length - 1) // self.block[dim] - first + 1))
        return tuple(cells)

    def _spread(self, cells: torch.Tensor, box: Box) -> torch.Tensor:
        """To a shape that broadcasts over the numbers of `box`."""
        cells = cells.to(self.dtype)
        if cells.numel() == 1:
            return cells.view(())
        for dim in range(cells.ndim):
            start, length = box[dim]
            if cells.shape[dim] > 1:
                cells = cells.index_select(
                    dim, torch.arange(start, start + length) // self.block[dim] - start // self.block[dim]
                )
        return cells.view(*cells.shape, *(1,) * (len(box) - cells.ndim))


def grid_of(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The blocks of a tensor of `shape` with `scales`: those that are said, or that the grid leaves no doubt of.

    Returns:
        None where the grid cannot be one of such a tensor.
    """
    if scales in ((), (1,)):
        return shape
    if len(scales) > len(shape):
        return None
    found = []
    for dim, (size, cells) in enumerate(zip(shape, scales, strict=False)):
        said = None if block is None or len(scales) != len(shape) else (1,) * (len(shape) - len(block)) + block
        if said is not None and said[dim] > 0 and -(-size // said[dim]) == cells:
            found.append(said[dim])
        elif cells and size % cells == 0:
            found.append(size // cells)
        else:
            return None
    return (*found, *shape[len(scales) :])


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of `bits`, 2, 4 or 8, out of int32 words `[..., N]`, the lowest bits first: `[..., N · 32 / bits]`."""
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return octets
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    integers: torch.Tensor = (octets.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return integers.flatten(-2)


@dataclass(frozen=True)
class PackedIntegers:
    """Small integers, several of which lie side by side along `dim` in one word of `words`."""

    words: StoredTensor
    """int32"""
    dim: int
    bits: int
    offset: int = 0
    """Is taken off each."""
    order: tuple[int, ...] = ()
    """Which place in a word the integers have, the lowest being 0; empty where they lie in order."""
    added: int = 0
    """To each word before it is taken apart; what overflows goes to the next integer, and at the end is lost."""

    @property
    def cut_order(self) -> tuple[int, ...]:
        return tuple(range(len(self.words.shape)))

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        count = 32 // self.bits
        start, length = box[self.dim]
        first = start // count
        span = first, (start + length - 1) // count - first + 1
        words = read(self.words, (*box[: self.dim], span, *box[self.dim + 1 :]))
        if self.added:
            words = words + self.added
        integers = unpack(words.movedim(self.dim, -1), self.bits)
        if self.order:
            integers = integers.view(*integers.shape[:-1], -1, count)[..., list(self.order)].flatten(-2)
        integers = integers.movedim(-1, self.dim).narrow(self.dim, start - first * count, length)
        return (integers.to(torch.int16) - self.offset).to(torch.int8 if self.offset else torch.int16)


@dataclass(frozen=True)
class Transposed:
    """The other way round."""

    source: StoredTensor
    """`[I, O]`"""

    @property
    def cut_order(self) -> tuple[int, ...]:
        return (1, 0)

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        rows, columns = box
        return read(self.source, (columns, rows)).mT


def transposed(stored: StoredTensor) -> StoredTensor:
    return replace(stored, shape=(stored.shape[1], stored.shape[0]), codes=Transposed(stored))
