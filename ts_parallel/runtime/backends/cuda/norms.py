"""Root mean square norms as one launch, with the addition of what the layer before gave as part of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from triton import next_power_of_2

from ts_parallel.partition.program import RmsNorm
from ts_parallel.runtime.backends.cuda.kernels import elementwise as kernels
from ts_parallel.runtime.backends.torch import norms as plain

AddNorm = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""hidden `[..., K]`, and what is added to it if there is something → their sum, and its norm."""


def make_norm(entry: RmsNorm, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """See `Backend.make_norm`."""
    add_norm = make_add_norm(entry, weight)
    return lambda hidden: add_norm(hidden, None)[1]


def make_add_norm(entry: RmsNorm, weight: torch.Tensor) -> AddNorm:
    """The norm of a sum, which is given too: the layer after the next adds to it."""
    plain_norm, width = plain.make_norm(entry, weight), len(weight)
    padded = next_power_of_2(width)
    num_warps = min(16, max(1, padded // 512))

    def add_norm(hidden: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        rows = _rows_of(hidden)
        is_alike = added is None or (added.dtype == hidden.dtype and added.shape == hidden.shape)
        if rows is None or hidden.dtype != weight.dtype or not is_alike:  # a residual stream in float32, say
            total = hidden if added is None else hidden + added
            return total, plain_norm(total)
        num_rows, num_inner, outer, inner = rows
        output = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        more = hidden if added is None else added.contiguous()
        total = hidden if added is None else torch.empty_like(output)
        if num_rows:
            kernels.rms_norm[(num_rows,)](
                hidden, more, weight, total, output, outer, inner, width, num_inner, entry.epsilon,
                K=width, WIDTH=padded, ADDS=added is not None, IS_OFFSET=entry.is_offset, num_warps=num_warps,
            )  # fmt: skip
        return total, output

    return add_norm


def _rows_of(hidden: torch.Tensor) -> tuple[int, int, int, int] | None:
    """How many rows, how many of them lie evenly, and the strides of so many and of one; None where they do not."""
    if hidden.stride(-1) != 1:
        return None
    sizes, strides = hidden.shape[:-1], hidden.stride()[:-1]
    own = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    num_rows = sizes.numel()
    while len(own) > 1 and own[-2][1] == own[-1][0] * own[-1][1]:
        (first, _), (second, stride) = own[-2:]
        own[-2:] = [(first * second, stride)]
    if len(own) > 2:
        return None
    if len(own) < 2:
        return num_rows, max(1, num_rows), 0, own[0][1] if own else 0
    (_, outer), (num_inner, inner) = own
    return num_rows, num_inner, outer, inner
