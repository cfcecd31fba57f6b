"""Linears whose weight lies in memory as the processor reads it best.

oneDNN reads a weight that was reordered once at about twice the speed of a plain one, and computes the same bits: a
decode step is bound by exactly that (measured in the README). Small weights stay plain, for there the dearer call costs
more than the reading gains. float32 stays plain too, for its result would round otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

_SMALLEST = 2**18  # elements


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """`weight` `[O, I]` in oneDNN's order, which `linear_layer` alone can read; as it is where that gains nothing."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or weight.numel() < _SMALLEST:
        return weight
    if not (torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return weight
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def linear_layer(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """`hidden [..., I]` → `[..., O]` by a `weight` `[O, I]`, packed or not."""
    if not weight.is_mkldnn:
        return partial(torch._C._nn.linear, weight=weight, bias=bias)
    call = torch.ops.mkldnn._linear_pointwise.default

    def linear(hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = call(hidden, weight, bias, "none", [], "")
        return result

    return linear
