"""One stage of a program as a callable: its source compiled, with this rank's weights for its global names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ts_parallel.partition.program import (
    Constant,
    LinearLayer,
    Operation,
    StageCode,
    StageGlobal,
    Supplied,
    Weight,
)
from ts_parallel.runtime.linears import linear_layer
from ts_parallel.topology import TensorParallelGroup


class Attention(Protocol):
    """Attention call `site` of a stage in one step: see `trace.attention_marker` for the shapes."""

    def __call__(
        self, step: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, site: int
    ) -> torch.Tensor: ...


class Stage:
    """Runs one stage. Owns the compiled function, which owns the weights that it was given."""

    def __init__(
        self,
        code: StageCode,
        tensors: Mapping[str, torch.Tensor],
        group: TensorParallelGroup,
        attention: Attention | None = None,
    ) -> None:
        """
        Args:
            tensors: this rank's parameters and buffers, by name.
        """
        self.inputs = code.inputs
        self.received = code.received
        self.sent = code.sent
        supplied = {
            "device": _device_of(code, tensors),
            "attention": attention,
            "all_reduce": group.all_reduce,
            "all_gather": group.all_gather,
            "from_own_start": group.from_own_start,
            "own_part": group.own_part,
        }
        names = {name: _value_of(entry, tensors, supplied) for name, entry in code.globals.items()}
        exec(compile(code.source, "<stage>", "exec"), names)
        self._function: Callable[..., list[torch.Tensor]] = names["run"]

    def __call__(
        self, step: Any, inputs: Mapping[str, torch.Tensor], received: Sequence[torch.Tensor] = ()
    ) -> list[torch.Tensor]:
        """What goes to the next stage; on the last one, the model's outputs."""
        return self._function(step, inputs, received)


def _device_of(code: StageCode, tensors: Mapping[str, torch.Tensor]) -> torch.device:
    """Where the weights are: what the code makes itself belongs there too."""
    weights = (entry for entry in code.globals.values() if isinstance(entry, Weight | LinearLayer))
    names = (entry.name if isinstance(entry, Weight) else entry.weight for entry in weights)
    return next((tensors[name].device for name in names), torch.device("cpu"))


def _value_of(entry: StageGlobal, tensors: Mapping[str, torch.Tensor], supplied: Mapping[str, Any]) -> Any:
    match entry:
        case Weight(name):
            return tensors[name]
        case LinearLayer(weight, bias):
            return linear_layer(tensors[weight], None if bias is None else tensors[bias])
        case Operation():
            return entry.resolve()
        case Constant(torch.Tensor() as value):
            return value.to(supplied["device"])
        case Constant(value):
            return value
        case Supplied(name):
            return supplied[name]
