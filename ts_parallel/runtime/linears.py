"""Linears, alone or in groups, over weights that lie in memory as the processor reads them best.

A decode step is bound by reading weights. On a processor with AVX-512 for bfloat16, a bfloat16 weight is laid out in
panels (`native.packed_weight`), as it is or as small integers, that one token reads from beginning to end and many
tokens find in the cache; linears of the same hidden states are one call, and so are a gated pair with its activation,
and a linear with the addition that follows it. All other weights stay plain, and torch multiplies: float32 keeps the
bits that transformers computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from ts_parallel.native import kernels
from ts_parallel.native.packed_weight import PackedWeight
from ts_parallel.partition.program import GatedLinear, LinearLayer, LinearLayers, Linears

Tensors: TypeAlias = Mapping[str, Any]
"""A rank's parameters and buffers by name; a linear's weight may be a `PackedWeight`."""

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch._C._nn.silu,
    "gelu_tanh": partial(torch._C._nn.gelu, approximate="tanh"),
    "relu": torch.relu,
}
_NUMBERS = {"silu": 1, "gelu_tanh": 2, "relu": 3}  # of `enum activation` in linear.h


def make_linears(entry: Linears, tensors: Tensors) -> Callable[..., Any]:
    """What computes `entry` with this rank's weights.

    Returns:
        For a `LinearLayer`, hidden `[..., I]`, and a residual `[..., O]` to be added if there is one → `[..., O]`. For
        `LinearLayers`, hidden → a tensor of each; for a `GatedLinear`, hidden → `[..., O]`.
    """
    match entry:
        case LinearLayer():
            return _linear(_Part(entry, tensors))
        case LinearLayers(layers):
            parts = [_Part(layer, tensors) for layer in layers]
            return _side_by_side(parts) if all(part.is_packed for part in parts) else _one_by_one(parts)
        case GatedLinear(gate, up, activation):
            first, second = _Part(gate, tensors), _Part(up, tensors)
            make = _gated_at_once if first.is_packed and second.is_packed else _gated
            return make(first, second, activation)


def make_embedding(weight: torch.Tensor | PackedWeight) -> Callable[[torch.Tensor], torch.Tensor]:
    """Token ids `[...]` → their rows `[..., I]` of `weight` `[O, I]`, which a head may share."""
    if isinstance(weight, torch.Tensor):
        return partial(torch.embedding, weight)
    return weight.look_up


class _Part:
    """One linear's weight and bias."""

    def __init__(self, layer: LinearLayer, tensors: Tensors) -> None:
        self.weight: torch.Tensor | PackedWeight = tensors[layer.weight]
        self.bias: torch.Tensor | None = None if layer.bias is None else tensors[layer.bias]

    @property
    def is_packed(self) -> bool:
        return isinstance(self.weight, PackedWeight)

    @property
    def num_outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def numbers(self) -> tuple[int, ...]:
        """`part_of` in kernels.c: addresses among them, so this is kept where they are."""
        assert isinstance(self.weight, PackedWeight)
        panels, _, *others = self.weight.part
        return panels, 0 if self.bias is None else self.bias.data_ptr(), *others


def _linear(part: _Part) -> Callable[..., torch.Tensor]:
    if isinstance(part.weight, torch.Tensor):
        plain = partial(torch._C._nn.linear, weight=part.weight, bias=part.bias)
        return lambda hidden, residual=None: plain(hidden) if residual is None else plain(hidden) + residual
    layer, num_outputs, run = _make_layer((part,)), part.num_outputs, kernels.linear

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
    layer, widths, run = _make_layer(parts), [part.num_outputs for part in parts], kernels.linear

    def linears(hidden: torch.Tensor) -> list[torch.Tensor]:
        hidden = hidden.contiguous()
        *sizes, width = hidden.shape
        outputs = [hidden.new_empty((*sizes, own)) for own in widths]
        places = [output.data_ptr() for output in outputs]
        run(layer, hidden.data_ptr(), width, hidden.numel() // width, 0, *places)
        return outputs

    return _keeping(linears, layer, *parts)


def _one_by_one(parts: Sequence[_Part]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    linears = [_linear(part) for part in parts]
    return lambda hidden: [linear(hidden) for linear in linears]


def _gated_at_once(gate: _Part, up: _Part, activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    layer, num_outputs, run = _make_layer((gate, up), _NUMBERS[activation]), gate.num_outputs, kernels.linear

    def gated(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.contiguous()
        *sizes, width = hidden.shape
        output = hidden.new_empty((*sizes, num_outputs))
        run(layer, hidden.data_ptr(), width, hidden.numel() // width, 0, output.data_ptr())
        return output

    return _keeping(gated, layer, gate, up)


def _gated(gate: _Part, up: _Part, activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    first, second, activate = _linear(gate), _linear(up), _ACTIVATIONS[activation]
    return lambda hidden: activate(first(hidden)) * second(hidden)


def _make_layer(parts: Sequence[_Part], activation: int = 0) -> Any:
    """The kernels' own description, which holds addresses: whoever has it keeps the parts."""
    numbers = [number for part in parts for number in part.numbers]
    return kernels.make_linear(int(parts[0].weight.shape[1]), activation, *numbers)


def layer_of(function: Callable[..., Any]) -> Any:
    """The kernels' own description of what `make_linears` made; None where they do not compute it."""
    return getattr(function, "layer", None)


def _keeping(function: Callable[..., Any], layer: Any, *parts: _Part) -> Callable[..., Any]:
    function.layer, function.parts = layer, parts  # type: ignore[attr-defined]
    return function
