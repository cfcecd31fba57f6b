"""A stage's graph as the source of one flat Python function, with the operations that a CPU or GPU runs fastest.

torch.fx's own interpreter and its generated code look every weight up and go through the operator dispatcher's Python
layer at every call. Here weights and callables are globals of one generated function, every tensor is forgotten after
its last use, operations that change nothing are left out, and groups of them that `fuse` finds are one call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.fx import Node

from ts_parallel.errors import PlanError
from ts_parallel.partition.graph.fuse import Group, find_groups
from ts_parallel.partition.graph.stages import StageGraph
from ts_parallel.partition.graph.sublayers import find_sublayers
from ts_parallel.partition.graph.trace import (
    all_gather_marker,
    all_reduce_marker,
    attention_marker,
    from_own_start_marker,
    own_part_marker,
)
from ts_parallel.partition.program import (
    ROWS,
    AttentionSublayer,
    Constant,
    Embedding,
    Operation,
    StageCode,
    StageGlobal,
    SublayerStack,
    Supplied,
    Weight,
)

aten = torch.ops.aten

# The same operations without the dispatcher's Python layer; each does what the overload does for these arguments.
_DIRECT: dict[Any, str] = {
    aten.linear.default: "torch._C._nn.linear",
    aten.add.Tensor: "operator.add",
    aten.sub.Tensor: "operator.sub",
    aten.mul.Tensor: "operator.mul",
    aten.div.Tensor: "operator.truediv",
    aten.neg.default: "torch.neg",
    aten.pow.Tensor_Scalar: "torch.pow",
    aten.rsqrt.default: "torch.rsqrt",
    aten.mean.dim: "torch.mean",
    aten.view.default: "torch.Tensor.view",
    aten.reshape.default: "torch.Tensor.reshape",
    aten.transpose.int: "torch.transpose",
    aten.permute.default: "torch.Tensor.permute",
    aten.unsqueeze.default: "torch.unsqueeze",
    aten.cat.default: "torch.cat",
    aten.silu.default: "torch._C._nn.silu",
    aten.gelu.default: "torch._C._nn.gelu",
    aten.tanh.default: "torch.tanh",
    aten.relu.default: "torch.relu",
    aten.sigmoid.default: "torch.sigmoid",
    aten.softmax.int: "torch.softmax",
    aten.matmul.default: "torch.matmul",
    aten.addmm.default: "torch.addmm",
    aten.cos.default: "torch.cos",
    aten.sin.default: "torch.sin",
    aten.to.dtype: "torch.Tensor.to",
    aten.sym_size.int: "torch.Tensor.size",
    aten.layer_norm.default: "torch.layer_norm",
    aten.chunk.default: "torch.chunk",
    aten.split.Tensor: "torch.Tensor.split",
    aten.contiguous.default: "torch.Tensor.contiguous",
    aten.clamp.default: "torch.clamp",
    aten.ne.Tensor: "torch.ne",
    aten.masked_fill.Scalar: "torch.Tensor.masked_fill",
}
_OPERATORS = {"operator.add", "operator.sub", "operator.mul", "operator.truediv"}
_SUPPLIED = {
    all_reduce_marker._opoverload: "all_reduce",
    all_gather_marker._opoverload: "all_gather",
    from_own_start_marker._opoverload: "from_own_start",
}


def write_stage(graph: StageGraph) -> StageCode:
    """
    Raises:
        PlanError: the graph calls a function that has no name of its own.
    """
    writer = _Writer(graph)
    return StageCode(
        source="\n".join(writer.lines),
        globals=writer.globals,
        inputs=tuple(dict.fromkeys(graph.inputs.values())),
        received=tuple(graph.crossings[node] for node in graph.received),
        sent=tuple(graph.crossings[node] for node in graph.sent if node in graph.crossings),
        sites=graph.sites,
    )


class _Writer:
    """Writes the function's source and collects its globals."""

    def __init__(self, graph: StageGraph) -> None:
        self._graph = graph
        self._groups = find_sublayers(graph, find_groups(graph))
        self.globals: dict[str, StageGlobal] = {}
        self.lines = ["def run(step, inputs, received):"]
        self._names: dict[Node, str] = {}
        self._taken = {node.name for node in (*graph.nodes, *graph.inputs, *graph.received)}
        self._write()

    def _write(self) -> None:
        graph = self._graph
        for node, name in graph.inputs.items():
            self._assign(node, f"inputs[{name!r}]")
        for index, node in enumerate(graph.received):
            self._assign(node, f"received[{index}]")
        statements = [node for node in graph.nodes if node not in self._groups or self._groups[node].results[0] is node]
        last_users = self._last_users(statements)
        for node in statements:
            if (group := self._groups.get(node)) is not None:
                self._assign_group(group)
            else:
                self._assign(node, self._expression(node))
            for done in last_users.get(node, ()):
                self.lines.append(f"    del {done}")
        self.lines.append(f"    return [{', '.join(self._names[node] for node in graph.sent)}]")

    def _assign(self, node: Node, expression: str) -> None:
        self._names[node] = node.name
        self.lines.append(f"    {node.name} = {expression}")

    def _assign_group(self, group: Group) -> None:
        first = group.results[0]
        name = group.call.name if isinstance(group.call, Supplied) else f"{first.name}_layer"
        arguments = [self._text(node) for node in group.inputs]
        if group.call == Supplied("attention"):
            query, key, value, cosine, sine, *sinks = arguments
            arguments = ["step", query, key, value, self._site(first), *(sinks or ["None"]), cosine, sine]
        elif isinstance(group.call, AttentionSublayer | SublayerStack):
            arguments = ["step", *arguments]
        call = f"{self._global(name, group.call)}({', '.join(arguments)})"
        for node in group.results:
            self._names[node] = node.name
        self.lines.append(f"    {', '.join(node.name for node in group.results)} = {call}")

    def _expression(self, node: Node) -> str:
        """Source text of what `node` computes."""
        same = _unchanged(node)
        if same is not None:
            return self._text(same)
        if node.target is operator.getitem:
            source, index = node.args
            return f"{self._text(source)}[{index!r}]"
        if (narrow := _as_narrow(node)) is not None:
            return f"{self._global('narrow', Operation('torch.narrow'))}({self._text(node.args[0])}, {narrow})"
        if (dim := self._dim_of_rows(node)) is not None:
            select = self._global("index_select", Operation("torch.index_select"))
            source, rows = node.all_input_nodes
            return f"{select}({self._text(source)}, {dim}, {self._text(rows)})"
        if node.target is attention_marker._opoverload:
            *tensors, sinks, _ = node.args
            arguments = [*(self._text(tensor) for tensor in tensors), self._site(node)]
            if sinks is not None:
                arguments.append(self._text(sinks))
            return f"{self._global('attention', Supplied('attention'))}(step, {', '.join(arguments)})"
        if node.target is aten.embedding.default and node.args[0] in self._graph.tensors:
            weight, token_ids = node.args[:2]
            embedding = Embedding(self._graph.tensors[weight])  # type: ignore[index]
            return f"{self._global(f'{node.name}_layer', embedding)}({self._text(token_ids)})"
        if node.target is own_part_marker._opoverload:
            tensor, starts, lengths, _ = node.args
            pieces = tuple(zip(starts, lengths, strict=True))  # type: ignore[arg-type]
            return f"{self._global('own_part', Supplied('own_part'))}({self._text(tensor)}, {pieces!r})"
        positional = [self._text(argument) for argument in node.args]
        named = [f"{name}={self._text(value)}" for name, value in node.kwargs.items()]
        return f"{self._callable(node)}({', '.join((*positional, *named))})"

    def _dim_of_rows(self, node: Node) -> int | None:
        """Along which dim `node` chooses the rows whose logits are wanted, none of which is counted from the end."""
        if node.target is not aten.index.Tensor or len(node.all_input_nodes) != 2:
            return None
        rows, places = node.all_input_nodes[1], list(node.args[1])  # type: ignore[arg-type]
        is_last_place = places == [*[None] * (len(places) - 1), rows]
        return len(places) - 1 if is_last_place and self._graph.inputs.get(rows) == ROWS else None

    def _site(self, node: Node) -> str:
        """Number of an attention call among the stage's."""
        return str(self._graph.site_numbers[int(node.args[-1])])  # type: ignore[arg-type]

    def _callable(self, node: Node) -> str:
        """Name of the function that does what `node` does."""
        target = node.target
        if target in _SUPPLIED:
            return self._global(_SUPPLIED[target], Supplied(_SUPPLIED[target]))
        direct = _DIRECT.get(target)
        if direct is not None and _takes(direct, node):
            return self._global(direct.rpartition(".")[2], Operation(direct))
        assert callable(target), node.format_node()
        return self._global(getattr(target, "__name__", "call").replace(".", "_"), _operation(target))

    def _global(self, name: str, value: StageGlobal) -> str:
        name = f"_{name}"
        while name in self._taken or self.globals.setdefault(name, value) != value:
            name += "_"
        return name

    def _text(self, argument: Any) -> str:
        """Source text of an argument."""
        if isinstance(argument, Node):
            return self._names.get(argument) or self._weight(argument)
        if isinstance(argument, (list, tuple)):
            inside = ", ".join(self._text(part) for part in argument)
            return f"[{inside}]"
        if isinstance(argument, slice):
            return f"slice({self._text(argument.start)}, {self._text(argument.stop)}, {self._text(argument.step)})"
        if argument is None or isinstance(argument, (bool, int, str)):
            return repr(argument)
        if isinstance(argument, float):
            return repr(argument) if argument == argument and abs(argument) != float("inf") else f'float("{argument}")'
        if isinstance(argument, torch.device):  # the trace was made on the CPU; the code belongs where the weights are
            return self._global("device", Supplied("device"))
        return self._global(f"c_{len(self.globals)}", Constant(argument))  # a dtype, a layout

    def _weight(self, node: Node) -> str:
        name = f"w_{node.name}"
        if node in self._graph.tensors:
            return self._global(name, Weight(self._graph.tensors[node]))
        return self._global(name, Constant(self._graph.constants[node]))

    def _last_users(self, statements: Sequence[Node]) -> dict[Node, list[str]]:
        """Node → the names that nobody reads after it."""
        kept = set(self._graph.sent)
        users: dict[Node, Node] = {}
        own = {*self._graph.nodes, *self._graph.inputs, *self._graph.received}
        for node in statements:
            group = self._groups.get(node)
            for parent in node.all_input_nodes if group is None else group.inputs:
                if parent in own and parent not in kept:
                    users[parent] = node
        last: dict[Node, list[str]] = {}
        for parent, node in users.items():
            last.setdefault(node, []).append(parent.name)
        return last


def _operation(target: Callable[..., Any]) -> Operation:
    """The name under which every process finds `target`."""
    if isinstance(target, torch._ops.OpOverload):
        definition = OPDEFS.get(target._schema.name)  # an operation of a library's own is there once it is imported
        return Operation(f"torch.ops.{target}", definition._init_fn.__module__ if definition else "torch")
    module = target.__module__
    operation = Operation(f"{module}.{target.__qualname__}", module)
    if operation.resolve() is not target:
        raise PlanError(f"{operation.name!r}, which the model calls, cannot be called by its name")
    return operation


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


def _takes(direct: str, node: Node) -> bool:
    """Whether a direct callable takes the arguments of `node`, which may have come by name (as `alpha` does)."""
    if direct in ("torch.mean", "torch.Tensor.to"):
        return all(name == "dtype" for name in node.kwargs)
    if direct in _OPERATORS:
        return isinstance(node.args[0], Node) and not node.kwargs
    return True
