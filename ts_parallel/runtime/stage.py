"""One stage of a program as a callable: its source compiled, with this rank's weights for its global names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ts_parallel.partition.program import (
    AttentionSublayer,
    Constant,
    Embedding,
    GatedLinear,
    GatedSublayer,
    LinearLayer,
    LinearLayers,
    Operation,
    RmsNorm,
    StageCode,
    StageGlobal,
    SublayerStack,
    Supplied,
    Weight,
    linears_of,
)
from ts_parallel.runtime.fused import make_norm, rotary
from ts_parallel.runtime.linears import Tensors, make_embedding, make_linears
from ts_parallel.runtime.sublayers import make_attention_sublayer, make_gated_sublayer, make_stack
from ts_parallel.topology import TensorParallelGroup


class Attention(Protocol):
    """Attention call `site` of a stage in one step: see `trace.attention_marker` for the shapes.

    With a cosine and a sine, `fused.rotary` by them comes before.
    """

    def __call__(
        self,
        step: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        site: int,
        sinks: torch.Tensor | None = None,
        cosine: torch.Tensor | None = None,
        sine: torch.Tensor | None = None,
        /,
    ) -> torch.Tensor: ...


class Stage:
    """Runs one stage. Owns the compiled function, which owns the weights that it was given."""

    def __init__(
        self,
        code: StageCode,
        tensors: Tensors,
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
            "group": group,
            "rotary": rotary,
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


def _device_of(code: StageCode, tensors: Tensors) -> torch.device:
    """Where the weights are: what the code makes itself belongs there too."""
    names = [entry.name for entry in code.globals.values() if isinstance(entry, Weight)]
    names += [entry.weight for entry in code.globals.values() if isinstance(entry, Embedding)]
    names += [layer.weight for entry in code.globals.values() for layer in linears_of(entry)]
    found = (tensors[name] for name in names)
    return next((tensor.device for tensor in found if isinstance(tensor, torch.Tensor)), torch.device("cpu"))


def _value_of(entry: StageGlobal, tensors: Tensors, supplied: Mapping[str, Any]) -> Any:
    match entry:
        case Weight(name):
            return tensors[name]
        case Embedding(weight):
            return make_embedding(tensors[weight])
        case LinearLayer() | LinearLayers() | GatedLinear():
            return make_linears(entry, tensors)
        case GatedSublayer():
            return make_gated_sublayer(entry, tensors)
        case AttentionSublayer():
            return make_attention_sublayer(entry, tensors, supplied["attention"])
        case SublayerStack():
            return make_stack(entry, tensors, supplied["attention"], supplied["group"])
        case RmsNorm(weight):
            return make_norm(entry, tensors[weight])
        case Operation():
            return entry.resolve()
        case Constant(torch.Tensor() as value):
            return value.to(supplied["device"])
        case Constant(value):
            return value
        case Supplied(name):
            return supplied[name]
