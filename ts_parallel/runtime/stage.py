"""One stage of a program as a callable: its source compiled, with this rank's weights for its global names."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

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
from ts_parallel.runtime.backends.base import Attention, Backend, Tensors
from ts_parallel.topology import TensorParallelGroup


class Stage:
    """Runs one stage. Owns the compiled function, which owns the weights that it was given."""

    def __init__(
        self,
        code: StageCode,
        tensors: Tensors,
        group: TensorParallelGroup,
        backend: Backend,
        attention: Attention | None = None,
    ) -> None:
        """
        Args:
            tensors: this rank's parameters and buffers, by name.
            attention: of a stage whose attention is paged.
        """
        self.inputs = code.inputs
        self.received = code.received
        self.sent = code.sent
        sums = backend.sums(group)
        supplied: dict[str, Any] = {
            "device": _device_of(code, tensors),
            "attention": attention,
            "rotary": backend.rotary,
            "all_reduce": sums.all_reduce,
            "all_gather": sums.all_gather,
            "from_own_start": group.from_own_start,
            "own_part": group.own_part,
        }

        names = {name: _value_of(entry, tensors, group, backend, supplied) for name, entry in code.globals.items()}
        exec(_compile(code.source), names)
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


def _value_of(
    entry: StageGlobal, tensors: Tensors, group: TensorParallelGroup, backend: Backend, supplied: Mapping[str, Any]
) -> Any:
    match entry:
        case Weight(name):
            return tensors[name]
        case Embedding(weight):
            return backend.make_embedding(tensors[weight])
        case LinearLayer() | LinearLayers() | GatedLinear():
            return backend.make_linears(entry, tensors)
        case GatedSublayer():
            return backend.make_gated_sublayer(entry, tensors)
        case AttentionSublayer():
            return backend.make_attention_sublayer(entry, tensors, supplied["attention"])
        case SublayerStack():
            return backend.make_stack(entry, tensors, supplied["attention"], group)
        case RmsNorm(weight):
            return backend.make_norm(entry, tensors[weight])
        case Operation():
            return entry.resolve()
        case Constant(torch.Tensor() as value):
            return value.to(supplied["device"])
        case Constant(value):
            return value
        case Supplied(name):
            return supplied[name]


def _compile(source: str) -> CodeType:
    """The code, by a name under which a traceback finds its lines, as a debugger does."""
    name = f"<stage {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return compile(source, name, "exec")
