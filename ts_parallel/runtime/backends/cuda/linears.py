"""Linears that read the same hidden states as one product, a gated pair among them, by a library's GEMM.

Their weights are put one below the other, once; the tensors that the stage was given become views of that, so they take
no more memory than before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton import next_power_of_2

from ts_parallel.partition.program import GatedLinear, LinearLayer, LinearLayers, Linears
from ts_parallel.runtime.backends.base import Tensors
from ts_parallel.runtime.backends.cuda.kernels import elementwise as kernels
from ts_parallel.runtime.backends.torch import linears as plain

_WIDEST = 1024  # numbers that one program activates


def make_linears(entry: Linears, tensors: Tensors) -> Callable[..., Any]:
    """See `Backend.make_linears`."""
    match entry:
        case LinearLayers(layers) if _can_be_joined(layers, tensors):
            return _side_by_side(layers, tensors)
        case GatedLinear(gate, up, activation) if _can_be_joined((gate, up), tensors):
            if tensors[gate.weight].shape == tensors[up.weight].shape:
                return _gated(gate, up, activation, tensors)
    return plain.make_linears(entry, tensors)


def _can_be_joined(layers: Sequence[LinearLayer], tensors: Tensors) -> bool:
    """Whether they are one product: different matrices of one dtype, each of whose tensor has its memory for itself."""
    weights = [tensors[layer.weight] for layer in layers]
    are_alike = all(
        weight.dtype == weights[0].dtype and weight.device == weights[0].device and weight.is_contiguous()
        for weight in weights
    )
    biases = [tensors[layer.bias] for layer in layers if layer.bias is not None]
    return (
        are_alike
        and len({layer.weight for layer in layers}) == len(layers)
        and all(bias.dtype == weights[0].dtype for bias in biases)
    )


def _joined(layers: Sequence[LinearLayer], tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights and biases one below the other; a linear without a bias, beside others that have one, has zeros."""
    weights = [tensors[layer.weight] for layer in layers]
    whole = torch.cat(weights)
    for weight, own in zip(weights, torch.split(whole, [len(weight) for weight in weights]), strict=True):
        weight.data = own
    if all(layer.bias is None for layer in layers):
        return whole, None
    biases = [
        weight.new_zeros(len(weight)) if layer.bias is None else tensors[layer.bias]
        for layer, weight in zip(layers, weights, strict=True)
    ]
    return whole, torch.cat(biases)


def _side_by_side(layers: Sequence[LinearLayer], tensors: Tensors) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    weight, bias = _joined(layers, tensors)
    widths = [len(tensors[layer.weight]) for layer in layers]

    def linears(hidden: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.split(torch._C._nn.linear(hidden, weight, bias), widths, -1))

    return linears


def _gated(
    gate: LinearLayer, up: LinearLayer, activation: str, tensors: Tensors
) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = _joined((gate, up), tensors)
    width = len(weight) // 2
    padded = min(_WIDEST, next_power_of_2(width))

    def gated(hidden: torch.Tensor) -> torch.Tensor:
        both = torch._C._nn.linear(hidden, weight, bias)
        output = both.new_empty((*both.shape[:-1], width))
        if num_rows := output.numel() // width:
            kernels.gate[num_rows, -(-width // padded)](
                both, output, 2 * width, K=width, WIDTH=padded, ACTIVATION=activation, num_warps=4
            )
        return output

    return gated
