"""Linears, alone or in groups, over weights as the checkpoint has them: float32 keeps the bits of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ts_parallel.partition.program import GatedLinear, LinearLayer, LinearLayers, Linears
from ts_parallel.runtime.backends.base import Tensors

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch._C._nn.silu,
    "gelu_tanh": partial(torch._C._nn.gelu, approximate="tanh"),
    "relu": torch.relu,
}


def make_linears(entry: Linears, tensors: Tensors) -> Callable[..., Any]:
    """See `Backend.make_linears`."""
    match entry:
        case LinearLayer(weight, bias):
            return _linear(tensors[weight], None if bias is None else tensors[bias])
        case LinearLayers(layers):
            return one_by_one([make_linears(layer, tensors) for layer in layers])
        case GatedLinear(gate, up, activation):
            return gated(make_linears(gate, tensors), make_linears(up, tensors), activation)


def make_embedding(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """See `Backend.make_embedding`."""
    return partial(torch.embedding, weight)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    plain = partial(torch._C._nn.linear, weight=weight, bias=bias)
    return lambda hidden, residual=None: plain(hidden) if residual is None else plain(hidden) + residual


def one_by_one(linears: Sequence[Callable[..., torch.Tensor]]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """hidden → the product of each."""
    return lambda hidden: [linear(hidden) for linear in linears]


def gated(
    gate: Callable[..., torch.Tensor], up: Callable[..., torch.Tensor], activation: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """hidden → `activation(gate(hidden)) * up(hidden)`."""
    activate = _ACTIVATIONS[activation]
    return lambda hidden: activate(gate(hidden)) * up(hidden)
