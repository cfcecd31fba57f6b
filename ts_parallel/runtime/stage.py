"""A stage's graph as one flat Python function, with the operations that a CPU or GPU runs fastest.

torch.fx's own interpreter and its generated code look every weight up and go through the operator dispatcher's Python
layer at every call. Here weights and callables are globals of one generated function, every tensor is forgotten after
its last use, and operations that change nothing are left out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.fx import Node

from ts_parallel.partition.stages import Crossing, StageGraph
from ts_parallel.partition.trace import all_gather_marker, all_reduce_marker, attention_marker
from ts_parallel.runtime.linears import Linear, pack_linear
from ts_parallel.topology import TensorParallelGroup

aten = torch.ops.aten


class Attention(Protocol):
    """Attention call `site` of a stage in one step: see `trace.attention_marker` for the shapes."""

    def __call__(
        self, step: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, site: int
    ) -> torch.Tensor: ...


# The same operations without the dispatcher's Python layer; each does what the overload does for these arguments.
_DIRECT: dict[Any, Callable[..., Any]] = {
    aten.linear.default: torch._C._nn.linear,
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.neg.default: torch.neg,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.rsqrt.default: torch.rsqrt,
    aten.mean.dim: torch.mean,
    aten.view.default: torch.Tensor.view,
    aten.reshape.default: torch.Tensor.reshape,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.Tensor.permute,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.cat.default: torch.cat,
    aten.silu.default: torch._C._nn.silu,
    aten.gelu.default: torch._C._nn.gelu,
    aten.tanh.default: torch.tanh,
    aten.relu.default: torch.relu,
    aten.sigmoid.default: torch.sigmoid,
    aten.softmax.int: torch.softmax,
    aten.matmul.default: torch.matmul,
    aten.addmm.default: torch.addmm,
    aten.cos.default: torch.cos,
    aten.sin.default: torch.sin,
    aten.to.dtype: torch.Tensor.to,
    aten.sym_size.int: torch.Tensor.size,
    aten.layer_norm.default: torch.layer_norm,
    aten.chunk.default: torch.chunk,
    aten.split.Tensor: torch.Tensor.split,
    aten.contiguous.default: torch.Tensor.contiguous,
}
_CAN_BE_PACKED = {aten.linear.default}


class Stage:
    """Runs one stage. Owns the generated function, and the weights that it was given."""

    def __init__(
        self,
        graph: StageGraph,
        tensors: Mapping[str, torch.Tensor],
        group: TensorParallelGroup,
        attention: Attention | None = None,
        release: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            tensors: this rank's parameters and buffers, by name.
            release: told of each parameter that lives on in a packed form alone; None where nothing is to be packed.
        """
        self.inputs: tuple[str, ...] = tuple(dict.fromkeys(graph.inputs.values()))
        self.received: tuple[Crossing, ...] = tuple(graph.crossings[node] for node in graph.received)
        self.sent: tuple[Crossing, ...] = tuple(graph.crossings[node] for node in graph.sent if node in graph.crossings)
        writer = _Writer(graph, tensors, group, attention, release)
        self.source = writer.source
        self._function = writer.compile()

    def __call__(
        self, step: Any, inputs: Mapping[str, torch.Tensor], received: Sequence[torch.Tensor] = ()
    ) -> list[torch.Tensor]:
        """What goes to the next stage; on the last one, the model's outputs."""
        result: list[torch.Tensor] = self._function(step, inputs, received)
        return result


class _Writer:
    """Writes the function's source and collects its globals."""

    def __init__(
        self,
        graph: StageGraph,
        tensors: Mapping[str, torch.Tensor],
        group: TensorParallelGroup,
        attention: Attention | None,
        release: Callable[[str], None] | None,
    ) -> None:
        self._graph, self._group, self._attention = graph, group, attention
        self._globals: dict[str, Any] = {}
        self._names: dict[Node, str] = {}
        self._weights = {node: tensors[name] for node, name in graph.tensors.items()}
        # The trace was made on the CPU; what its code makes itself belongs where the weights are.
        self._device = next((tensor.device for tensor in self._weights.values()), torch.device("cpu"))
        self._weights |= {node: value.to(self._device) for node, value in graph.constants.items()}
        self._taken = {node.name for node in (*graph.nodes, *graph.inputs, *graph.received)}
        self._release = release
        self._lines = ["def run(step, inputs, received):"]
        self._write()
        self.source = "\n".join(self._lines)

    def compile(self) -> Callable[..., list[torch.Tensor]]:
        exec(compile(self.source, "<stage>", "exec"), self._globals)
        function: Callable[..., list[torch.Tensor]] = self._globals["run"]
        return function

    def _write(self) -> None:
        graph = self._graph
        for node, name in graph.inputs.items():
            self._assign(node, f"inputs[{name!r}]")
        for index, node in enumerate(graph.received):
            self._assign(node, f"received[{index}]")
        last_users = self._last_users()
        for node in graph.nodes:
            self._write_call(node)
            for done in last_users.get(node, ()):
                self._lines.append(f"    del {done}")
        self._lines.append(f"    return [{', '.join(self._names[node] for node in graph.sent)}]")

    def _assign(self, node: Node, expression: str) -> None:
        self._names[node] = node.name
        self._lines.append(f"    {node.name} = {expression}")

    def _write_call(self, node: Node) -> None:
        same = _unchanged(node)
        if same is not None:
            self._assign(node, self._text(same))
            return
        if node.target is operator.getitem:
            source, index = node.args
            self._assign(node, f"{self._text(source)}[{index!r}]")
            return
        if (narrow := _as_narrow(node)) is not None:
            self._assign(node, f"{self._global('narrow', torch.narrow)}({self._text(node.args[0])}, {narrow})")
            return
        if node.target is attention_marker._opoverload:
            *tensors, number = node.args
            arguments = ", ".join(self._text(tensor) for tensor in tensors)
            site = self._graph.site_numbers[int(number)]  # type: ignore[arg-type]
            self._assign(node, f"{self._global('attention', self._attention)}(step, {arguments}, {site})")
            return
        function, arguments_of = self._callable(node)
        positional = [self._text(argument) for argument in arguments_of]
        named = [f"{name}={self._text(value)}" for name, value in node.kwargs.items()]
        self._assign(node, f"{function}({', '.join((*positional, *named))})")

    def _callable(self, node: Node) -> tuple[str, tuple[Any, ...]]:
        """Name of the function that does what `node` does, and the arguments that it takes."""
        target = node.target
        if target is all_reduce_marker._opoverload:
            return self._global("all_reduce", self._group.all_reduce), node.args
        if target is all_gather_marker._opoverload:
            return self._global("all_gather", self._group.all_gather), node.args
        if target in _CAN_BE_PACKED and (packed := self._pack(node)) is not None:
            return self._global(f"{node.name}_packed", packed), node.args[:1]
        direct = _DIRECT.get(target)
        if direct in (operator.add, operator.sub) and node.kwargs:  # alpha
            direct = None
        if direct is not None and _takes(direct, node):
            return self._global(getattr(direct, "__name__", "call"), direct), node.args
        if isinstance(target, torch._ops.OpOverload):
            return self._global(str(target).replace(".", "_"), target), node.args
        return self._global(getattr(target, "__name__", "call"), target), node.args

    def _pack(self, node: Node) -> Linear | None:
        """The linear with its weight in packed form, if that is worth it; the plain weight is given up."""
        source = node.args[1]
        # A weight that others use too (a tied embedding) would be there twice.
        if self._release is None or source not in self._weights or len(source.users) > 1:  # type: ignore[union-attr]
            return None
        bias = self._weights[node.args[2]] if len(node.args) > 2 and node.args[2] is not None else None  # type: ignore[index]
        packed = pack_linear(self._weights[source], bias)  # type: ignore[index]
        if packed is not None:
            del self._weights[source]  # type: ignore[arg-type]
            self._release(self._graph.tensors[source])  # type: ignore[index]
        return packed

    def _global(self, name: str, value: Any) -> str:
        name = f"_{name}"
        while name in self._taken or self._globals.get(name, value) is not value:
            name += "_"
        self._globals[name] = value
        return name

    def _text(self, argument: Any) -> str:
        """Source text of an argument."""
        if isinstance(argument, Node):
            if argument in self._names:
                return self._names[argument]
            return self._global(f"w_{argument.name}", self._weights[argument])
        if isinstance(argument, (list, tuple)):
            inside = ", ".join(self._text(part) for part in argument)
            return f"[{inside}]"
        if isinstance(argument, slice):
            return f"slice({self._text(argument.start)}, {self._text(argument.stop)}, {self._text(argument.step)})"
        if argument is None or isinstance(argument, (bool, int, str)):
            return repr(argument)
        if isinstance(argument, float):
            return repr(argument) if argument == argument and abs(argument) != float("inf") else f'float("{argument}")'
        if isinstance(argument, torch.device):
            argument = self._device
        return self._global(f"c_{len(self._globals)}", argument)  # a dtype, a device, a layout

    def _last_users(self) -> dict[Node, list[str]]:
        """Node → the names that nobody reads after it."""
        kept = set(self._graph.sent)
        users: dict[Node, Node] = {}
        own = {*self._graph.nodes, *self._graph.inputs, *self._graph.received}
        for node in self._graph.nodes:
            for parent in node.all_input_nodes:
                if parent in own and parent not in kept:
                    users[parent] = node
        last: dict[Node, list[str]] = {}
        for parent, node in users.items():
            last.setdefault(node, []).append(parent.name)
        return last


def _unchanged(node: Node) -> Any:
    """The argument that `node` returns as it is; None where it does something."""
    value, source = node.meta.get("val"), node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(value, torch.Tensor):
        return None
    before = source.meta.get("val")
    if not isinstance(before, torch.Tensor) or before.dtype != value.dtype or before.device != value.device:
        return None
    if node.target in (aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default):
        return source
    if node.target in (
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.type_as.default,
    ):
        return source
    if node.target is aten.dropout.default and node.args[2] is False:
        return source
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and node.args[1] == 1.0 and isinstance(node.args[1], float):
        return source
    return None


def _as_narrow(node: Node) -> str | None:
    """`dim, start, length` of a slice whose sizes are known, which `torch.narrow` takes faster."""
    if node.target is not aten.slice.Tensor or node.kwargs or len(node.args) != 4:
        return None
    source, dim, start, end = node.args
    numbers = (dim, start, end)
    size = source.meta["val"].shape[dim]  # type: ignore[union-attr]
    if not isinstance(size, int) or not all(isinstance(number, int) for number in numbers):
        return None
    first, last, _ = slice(start, end).indices(size)
    return f"{dim}, {first}, {max(0, last - first)}"


def _takes(direct: Callable[..., Any], node: Node) -> bool:
    """Whether a direct callable takes the arguments of `node`, which may have come by name."""
    if direct in (torch.mean, torch.Tensor.to) and any(name not in ("dtype",) for name in node.kwargs):
        return False
    if direct in (operator.add, operator.sub, operator.mul, operator.truediv):
        return isinstance(node.args[0], Node) and not node.kwargs
    return True
