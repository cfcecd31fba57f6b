"""Linears whose weight lies in memory as the processor reads it best.

oneDNN reads a weight that was reordered once at about twice the speed of a plain one, and computes the same bits: a
decode step is bound by exactly that (measured in the README). Small weights stay plain, for there the dearer call costs
more than the reading gains. float32 stays plain too, for its result would round otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Linear = Callable[[torch.Tensor], torch.Tensor]

_SMALLEST = 2**18  # elements


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear | None:
    """`hidden [..., I]` → `[..., O]` with a reordered copy of `weight` `[O, I]`; None where that gains nothing here."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or weight.numel() < _SMALLEST:
        return None
    if not (torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    call = torch.ops.mkldnn._linear_pointwise.default

    def linear(hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = call(hidden, packed, bias, "none", [], "")
        return result

    return linear
