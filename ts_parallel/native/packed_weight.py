"""A linear's weight as the kernels read it. Knows the layout, not who reads it.

O output features, I input features. Panels of 64 outputs follow each other; in a panel, two input features of all 64
outputs do: `[o // 64, i // 2, o % 64, i % 2]`, zero where there is no output. The numbers are those of bfloat16 in 12
bits each, of which none is lost (numbers/coded.h), those of float16 as they are, or small integers with scales of
either (numbers/numbers.h), by which the largest number of a scale is 127 or 7: zero stays zero, and no number is off by
more than half a scale.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ts_parallel.huge_pages import map_pages
from ts_parallel.native import kernels_for

if TYPE_CHECKING:
    from ts_parallel.native.kernel_calls import Kernels

PANEL = 64
INT4_GROUP = 64  # inputs of an output that share a scale, if nobody says how many; of int8, all inputs do
_PLAIN, _CODED = 0, 3  # `enum number_kind` of numbers/numbers.h
_INTEGERS = {"int8": 1, "int4": 2}
_BOUNDS = {"int8": (-128, 127), "int4": (-8, 7)}
_MOST_OFF = 2**-8  # that a scale may be, of itself, where it comes in another dtype
_MOST_INPUTS = 2**18 - 2  # an exception (numbers/coded.h) has 17 bits for its pair


class _HugePages:
    """Memory in pages of 2 MiB where the system has them: reading weights from 4 KiB pages costs a fifth of the speed.

    Weights lie side by side in regions; a region goes back when the last of its weights does.
    """

    _REGION = 2**26  # bytes
    _LINE = 64  # bytes of a cache line

    def __init__(self) -> None:
        self._region = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any values, on a cache line's border."""
        num_bytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            if num_bytes > len(self._region):
                self._region = map_pages(max(self._REGION, num_bytes))
            taken = self._region[:num_bytes]
            self._region = self._region[-(-num_bytes // self._LINE) * self._LINE :]
        return taken.view(dtype).view(shape)


_memory = _HugePages()


@dataclass(frozen=True)
class PackedWeight:
    """A weight `[O, I]` in panels."""

    panels: torch.Tensor = field(repr=False)
    """uint8 `[⌈O / 64⌉, bytes]`."""
    shape: tuple[int, int]
    """(O, I)."""
    dtype: torch.dtype
    """bfloat16 or float16: what the numbers were before they were packed, and what they multiply."""
    quantization: str | None = None
    """`int8` or `int4`; None where the numbers are all there, of bfloat16 coded."""
    scales: torch.Tensor | None = field(default=None, repr=False)
    """`[⌈O / 64⌉, groups of inputs, 64]` of the integers."""
    group: int = 0
    """Neighbouring inputs of an output that share a scale."""
    plain: dict[int, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    """By their number, bfloat16 `[I / 2, 64, 2]` each: panels whose numbers are too far from each other for codes."""

    @staticmethod
    def allocate(
        shape: tuple[int, int],
        quantization: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        group: int | None = None,
    ) -> PackedWeight:
        """Memory for a weight of this shape, whose rows, of this dtype, are to be `put`.

        Args:
            group: inputs that share a scale, an even number; None: as many as suit the integers.
        """
        num_outputs, num_inputs = shape
        num_panels, num_pairs = -(-num_outputs // PANEL), num_inputs // 2
        if quantization is None:
            if _is_coded(dtype):
                num_bytes = _kernels_for(dtype).coded_panel_bytes(num_pairs)
            else:
                num_bytes = num_pairs * 2 * PANEL * dtype.itemsize
            return PackedWeight(_memory.take((num_panels, num_bytes), torch.uint8), shape, dtype)
        num_bytes = {"int8": PANEL * 2, "int4": PANEL}[quantization]
        group = group or (num_inputs if quantization == "int8" else INT4_GROUP)
        num_groups = -(-num_inputs // group)
        panels = _memory.take((num_panels, num_pairs * num_bytes), torch.uint8)
        scales = _memory.take((num_panels, num_groups, PANEL), dtype)
        return PackedWeight(panels, shape, dtype, quantization, scales, group)

    @property
    def kernels(self) -> Kernels:
        """Those that read it."""
        return _kernels_for(self.dtype)

    @property
    def nbytes(self) -> int:
        others = self.plain.values() if self.scales is None else [self.scales]
        return self.panels.nbytes + sum(other.nbytes for other in others)

    @property
    def part(self) -> tuple[int, ...]:
        """What a linear's part is to the kernels, which `part_of` in kernels.c reads: a bias would be its second.

        Addresses are among it: whoever has it keeps this.
        """
        scales = 0 if self.scales is None else self.scales.data_ptr()
        return self.panels.data_ptr(), 0, self.shape[0], self._kind, scales, self.group // 2

    @property
    def _kind(self) -> int:
        if self.quantization is not None:
            return _INTEGERS[self.quantization]
        return _CODED if _is_coded(self.dtype) else _PLAIN

    def put(self, first: int, rows: torch.Tensor) -> bool:
        """Lay the `rows` `[N, I]` down, of which `first`, a multiple of 64, is the first; the last panel may be open.

        Their numbers may be strided by row, not within one.

        Returns: whether there is NaN among them.
        """
        assert first % PANEL == 0 and (len(rows) % PANEL == 0 or first + len(rows) == self.shape[0])
        assert rows.dtype == self.dtype and rows.stride(1) == 1
        if self._kind == _CODED:
            return self._put_coded(first, rows)
        panel, source = self.panels[first // PANEL], (rows.data_ptr(), len(rows), self.shape[1], rows.stride(0))
        if self.scales is None:
            return self.kernels.pack(panel.data_ptr(), *source)
        scales = self.scales[first // PANEL : -(-(first + len(rows)) // PANEL)]
        self.kernels.quantize(self._kind, panel.data_ptr(), scales.data_ptr(), self.group, *source)
        return bool(scales.isnan().any())  # where a number is, its scale is too

    def put_integers(self, first: int, integers: torch.Tensor, scales: torch.Tensor) -> bool:
        """Lay down rows that are int8 `integers` `[N, I]` times `scales` `[N, groups]` of any dtype, as `put` does.

        Returns: whether they can be so; nothing is laid down where an integer is none of this size, or a scale is lost
            when it is rounded to the weight's dtype.
        """
        assert self.scales is not None and self.quantization is not None
        rounded, (least, most) = scales.to(self.dtype), _BOUNDS[self.quantization]
        is_close = (rounded.float() - scales.float()).abs() <= _MOST_OFF * scales.float().abs()  # nor is NaN
        if integers.min() < least or integers.max() > most or not is_close.all():
            return False
        integers, num_panels = integers.contiguous(), -(-len(integers) // PANEL)
        panel, own = self.panels[first // PANEL], self.scales[first // PANEL : first // PANEL + num_panels]
        layout = (len(integers), integers.shape[1], integers.stride(0))
        self.kernels.place(self._kind, panel.data_ptr(), integers.data_ptr(), *layout)
        missing = num_panels * PANEL - len(integers)
        own.copy_(torch.nn.functional.pad(rounded, (0, 0, 0, missing)).view(num_panels, PANEL, -1).mT)
        return True

    def _put_coded(self, first: int, rows: torch.Tensor) -> bool:
        has_nan, number, layout, kernels = False, first // PANEL, (self.shape[1], rows.stride(0)), self.kernels
        while len(rows):
            num_coded = kernels.code(self.panels[number].data_ptr(), rows.data_ptr(), len(rows), *layout)
            number, rows = number + num_coded, rows[num_coded * PANEL :]
            if len(rows):  # begins with a panel that cannot be
                plain = self.plain[number] = _memory.take((self.shape[1] // 2, PANEL, 2), self.dtype)
                has_nan |= kernels.pack(plain.data_ptr(), rows.data_ptr(), min(PANEL, len(rows)), *layout)
                kernels.keep_plain(self.panels[number].data_ptr(), plain.data_ptr())
                number, rows = number + 1, rows[PANEL:]
        return has_nan

    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """The `rows` int64 `[...]` of it: `[..., I]`, integers times scales where it has those."""
        rows = rows.contiguous()
        found = torch.empty((*rows.shape, self.shape[1]), dtype=self.dtype)
        self.kernels.embedding(self.shape[1], rows.data_ptr(), rows.numel(), found.data_ptr(), *self.part)
        return found

    def unpack(self) -> torch.Tensor:
        """The plain weight `[O, I]`."""
        return self.look_up(torch.arange(self.shape[0]))


def can_pack(weight: torch.Tensor) -> bool:
    """Whether the kernels take a linear's `weight` `[O, I]`."""
    return (
        kernels_for(weight.dtype) is not None
        and weight.device.type == "cpu"
        and weight.ndim == 2
        and weight.shape[1] % 2 == 0
        and weight.shape[1] <= _MOST_INPUTS
    )


def _kernels_for(dtype: torch.dtype) -> Kernels:
    found = kernels_for(dtype)
    assert found is not None, "`can_pack` has been asked"
    return found


def _is_coded(dtype: torch.dtype) -> bool:
    """Whether its numbers lie in codes where nothing is to be lost: the exponents of float16 are too short for it."""
    return dtype == torch.bfloat16
