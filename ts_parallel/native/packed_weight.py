"""A linear's weight as the kernels read it. Knows the layout, not who reads it.

O output features, I input features. Panels of 64 outputs follow each other; in a panel, two input features of all 64
outputs do: `panels[o // 64, i // 2, o % 64, i % 2]`, zero where there is no output.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import torch

from ts_parallel.native import HAS_KERNELS, kernels
from ts_parallel.native.huge_pages import map_pages

PANEL = 64


class _HugePages:
    """Memory in pages of 2 MiB where the system has them: reading weights from 4 KiB pages costs a fifth of the speed.

    Weights lie side by side in regions; a region goes back when the last of its weights does.
    """

    _REGION = 2**26  # bytes

    def __init__(self) -> None:
        self._region = torch.empty(0, dtype=torch.bfloat16)
        self._lock = threading.Lock()

    def take(self, num_elements: int) -> torch.Tensor:
        """bfloat16 `[num_elements]`, on a cache line's border."""
        with self._lock:
            if num_elements > len(self._region):
                self._region = map_pages(max(self._REGION, num_elements * 2)).view(torch.bfloat16)
            taken, self._region = self._region[:num_elements], self._region[-(-num_elements // 32) * 32 :]
        return taken


_memory = _HugePages()


@dataclass(frozen=True)
class PackedWeight:
    """A bfloat16 weight `[O, I]` in panels."""

    panels: torch.Tensor = field(repr=False)
    """bfloat16 `[⌈O / 64⌉, I / 2, 64, 2]`."""
    shape: tuple[int, int]
    """(O, I)."""

    @staticmethod
    def allocate(shape: tuple[int, int]) -> PackedWeight:
        """Memory for a weight of this shape, whose rows are to be `put`."""
        num_outputs, num_inputs = shape
        sizes = (-(-num_outputs // PANEL), num_inputs // 2, PANEL, 2)
        return PackedWeight(_memory.take(math.prod(sizes)).view(sizes), shape)

    def put(self, first: int, rows: torch.Tensor) -> None:
        """Lay the `rows` `[N, I]` down, of which `first`, a multiple of 64, is the first; the last panel may be open.

        Their numbers may be strided by row, not within one.
        """
        assert first % PANEL == 0 and (len(rows) % PANEL == 0 or first + len(rows) == self.shape[0])
        assert rows.dtype == torch.bfloat16 and rows.stride(1) == 1
        panel = self.panels[first // PANEL]
        kernels.pack(panel.data_ptr(), rows.data_ptr(), len(rows), self.shape[1], rows.stride(0))

    def unpack(self) -> torch.Tensor:
        """The plain weight `[O, I]`."""
        rows = self.panels.transpose(1, 2).reshape(-1, self.shape[1])
        return rows[: self.shape[0]].contiguous()


def can_pack(weight: torch.Tensor) -> bool:
    """Whether the kernels take a linear's `weight` `[O, I]`."""
    return (
        HAS_KERNELS
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.ndim == 2
        and weight.shape[1] % 2 == 0
    )
