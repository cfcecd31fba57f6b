"""Linears, alone or in groups, over weights that lie in panels.

A decode step is bound by reading weights. In panels (`native.packed_weight`), as it is or as small integers, a weight
is read from beginning to end by one token and found in the cache by many; linears of the same hidden states are one
call, and so are a gated pair with its activation, and a linear with the addition that follows it. Weights that lie
otherwise are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ts_parallel.native.packed_weight import PackedWeight
from ts_parallel.partition.program import GatedLinear, LinearLayer, LinearLayers, Linears
from ts_parallel.runtime.backends.base import Tensors
from ts_parallel.runtime.backends.torch import linears as plain

_NUMBERS = {"silu": 1, "gelu_tanh": 2, "relu": 3}  # of `enum activation` in native/operations/linear.h


def make_linears(entry: Linears, tensors: Tensors) -> Callable[..., Any]:
    """See `Backend.make_linears`."""
    match entry:
        case LinearLayer():
            return _linear(_Part(entry, tensors)) if _are_packed(tensors, entry) else plain.make_linears(entry, tensors)
        case LinearLayers(layers):
            if _are_packed(tensors, *layers):
                return _side_by_side([_Part(layer, tensors) for layer in layers])
            return plain.one_by_one([make_linears(layer, tensors) for layer in layers])
        case GatedLinear(gate, up, activation):
            if _are_packed(tensors, gate, up):
                return _gated(_Part(gate, tensors), _Part(up, tensors), activation)
            return plain.gated(make_linears(gate, tensors), make_linears(up, tensors), activation)


def make_embedding(weight: torch.Tensor | PackedWeight) -> Callable[[torch.Tensor], torch.Tensor]:
    """See `Backend.make_embedding`."""
    return weight.look_up if isinstance(weight, PackedWeight) else plain.make_embedding(weight)


def _are_packed(tensors: Tensors, *layers: LinearLayer) -> bool:
    """Whether these are one call of the kernels: all of them packed, and of one dtype."""
    weights = [tensors[layer.weight] for layer in layers]
    return all(isinstance(weight, PackedWeight) and weight.dtype == weights[0].dtype for weight in weights)


class _Part:
    """One linear's weight, which is packed, and bias."""

    def __init__(self, layer: LinearLayer, tensors: Tensors) -> None:
        self.weight: PackedWeight = tensors[layer.weight]
        self.bias: torch.Tensor | None = None if layer.bias is None else tensors[layer.bias]

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def numbers(self) -> tuple[int, ...]:
        """`part_of` in kernels.c: addresses among them, so this is kept where they are."""
        panels, _, *others = self.weight.part
        return panels, 0 if self.bias is None else self.bias.data_ptr(), *others


def _linear(part: _Part) -> Callable[..., torch.Tensor]:
    layer, num_outputs, run = _make_layer((part,)), part.num_outputs, part.weight.kernels.linear

    def linear(hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        hidden = hidden.contiguous()
        *sizes, width = hidden.shape
        output = hidden.new_empty((*sizes, num_outputs))
        added = 0
        if residual is not None:
            residual = residual.contiguous()
            added = residual.data_ptr()
        run(layer, hidden.data_ptr(), width, hidden.numel() // width, added, output.data_ptr())
        return output

    return _keeping(linear, layer, part)


def _side_by_side(parts: Sequence[_Part]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    layer, widths, run = _make_layer(parts), [part.num_outputs for part in parts], parts[0].weight.kernels.linear

    def linears(hidden: torch.Tensor) -> list[torch.Tensor]:
        hidden = hidden.contiguous()
        *sizes, width = hidden.shape
        outputs = [hidden.new_empty((*sizes, own)) for own in widths]
        places = [output.data_ptr() for output in outputs]
        run(layer, hidden.data_ptr(), width, hidden.numel() // width, 0, *places)
        return outputs

    return _keeping(linears, layer, *parts)


def _gated(gate: _Part, up: _Part, activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    layer, num_outputs = _make_layer((gate, up), _NUMBERS[activation]), gate.num_outputs
    run = gate.weight.kernels.linear

    def gated(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.contiguous()
        *sizes, width = hidden.shape
        output = hidden.new_empty((*sizes, num_outputs))
        run(layer, hidden.data_ptr(), width, hidden.numel() // width, 0, output.data_ptr())
        return output

    return _keeping(gated, layer, gate, up)


def _make_layer(parts: Sequence[_Part], activation: int = 0) -> Any:
    """The kernels' own description, which holds addresses: whoever has it keeps the parts."""
    numbers = [number for part in parts for number in part.numbers]
    return parts[0].weight.kernels.make_linear(parts[0].weight.shape[1], activation, *numbers)


def layer_of(function: Callable[..., Any], dtype: torch.dtype) -> Any:
    """The own description that the kernels for `dtype` have of what `make_linears` made; None where they do not compute
    it."""
    parts = getattr(function, "parts", ())
    return function.layer if parts and parts[0].weight.dtype == dtype else None  # type: ignore[attr-defined]


def _keeping(function: Callable[..., Any], layer: Any, *parts: _Part) -> Callable[..., Any]:
    function.layer, function.parts = layer, parts  # type: ignore[attr-defined]
    return function
