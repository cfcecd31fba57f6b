"""Numbers that lie in another order of rows than transformers has them. What is read is moved, nothing is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ts_parallel.checkpoint.codes.integers import HasRowIntegers, Read, RowIntegers
from ts_parallel.checkpoint.stored import Box, StoredTensor


@dataclass(frozen=True)
class PairedRows:
    """The first and second half of each head's rows lie alternately in `source`; here one half follows the other."""

    source: StoredTensor
    head: int
    """Rows of one."""

    @property
    def cut_order(self) -> tuple[int, ...]:
        return tuple(range(len(self.source.shape)))

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        (start, length), *others = box
        rows = torch.arange(start, start + length)
        place = rows % self.head
        half = self.head // 2
        stored = rows - place + place % half * 2 + place // half
        first, last = int(stored.min()), int(stored.max())
        return read(self.source, ((first, last - first + 1), *others))[stored - first]

    def row_integers(self, read: Read) -> RowIntegers | None:
        codes = self.source.codes
        own = codes.row_integers(read) if isinstance(codes, HasRowIntegers) else None
        if own is None:
            return None
        integers, scales = (replace(each, codes=PairedRows(each, self.head)) for each in (own.integers, own.scales))
        return replace(own, integers=integers, scales=scales)
