"""Groups of operations in a stage's graph that one call can do: where a step's time goes beside its matrix products.

What is recognised, in any family: linears that read the same hidden states, a gated pair of them, a linear whose result
is added to something, root-mean-square norms, rotary embedding in halves, and attention with it. How such a group is
computed is the runtime's business; where it has no better way, it does the very operations that stood in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ts_parallel.partition.graph.stages import StageGraph
from ts_parallel.partition.graph.trace import attention_marker
from ts_parallel.partition.program import GatedLinear, LinearLayer, LinearLayers, RmsNorm, StageGlobal, Supplied

aten = torch.ops.aten

_ACTIVATIONS: dict[Any, str] = {aten.silu.default: "silu", aten.gelu.default: "gelu", aten.relu.default: "relu"}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default}


@dataclass(frozen=True)
class Group:
    """Nodes that one call computes, at the place of `results[0]`."""

    call: StageGlobal
    inputs: tuple[Node, ...]
    """What the call is given, in order."""
    results: tuple[Node, ...]
    """What it returns: one tensor, or as many as there are."""
    absorbed: frozenset[Node]
    """Nodes that need not be computed any more, `results` among them."""


def find_groups(graph: StageGraph) -> dict[Node, Group]:
    """Every node that a group computes → its group. No node is in two."""
    finder = _GroupFinder(graph)
    for find in (finder.gated_linear, finder.residual_linear, finder.norm, finder.rotary):
        for node in graph.nodes:
            if (group := find(node)) is not None:
                finder.take(group)
    for group in [*finder.linears_of_one_input(), *finder.rotary_attentions()]:
        finder.take(group)
    return finder.groups


class _GroupFinder:
    """Owns the groups found so far."""

    def __init__(self, graph: StageGraph) -> None:
        self._graph = graph
        self._own = set(graph.nodes)
        self._kept = set(graph.sent)
        self.groups: dict[Node, Group] = {}

    def take(self, group: Group) -> None:
        self.groups |= dict.fromkeys(group.absorbed, group)

    def linear(self, node: Any) -> LinearLayer | None:
        """A linear whose weight nothing else reads but an embedding, which may be tied to it."""
        if not isinstance(node, Node) or node.target is not aten.linear.default or node not in self._own:
            return None
        _, weight, bias = (*_args(node), None)[:3]
        tensors = self._graph.tensors
        if not isinstance(weight, Node) or weight not in tensors:
            return None
        if any(user is not node and user.target is not aten.embedding.default for user in weight.users):
            return None
        if bias is not None and bias not in tensors:
            return None
        return LinearLayer(tensors[weight], None if bias is None else tensors[bias])

    def gated_linear(self, node: Node) -> Group | None:
        """`act(gate(x)) * up(x)`, as in SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""
        if node.target is not aten.mul.Tensor:
            return None
        for active, other in (_args(node)[:2], _args(node)[1::-1]):
            if not isinstance(active, Node) or (activation := _activation(active)) is None:
                continue
            first = _args(active)[0]
            gate, up = self.linear(first), self.linear(other)
            if gate is None or up is None or _args(first)[0] is not _args(other)[0]:
                continue
            absorbed = {node, active, first, other}
            if self._is_closed(absorbed, (node,)):
                hidden: Any = _args(first)[0]
                return Group(GatedLinear(gate, up, activation), (hidden,), (node,), frozenset(absorbed))
        return None

    def residual_linear(self, node: Node) -> Group | None:
        """`linear(x) + residual`, which adds what has been rounded."""
        if node.target is not aten.add.Tensor or node.kwargs:
            return None
        for product, residual in (_args(node)[:2], _args(node)[1::-1]):
            layer = self.linear(product)
            if layer is None or not isinstance(residual, Node) or not _are_alike(product, residual, node):
                continue
            absorbed = {node, product}
            if product is not residual and self._is_closed(absorbed, (node,)):
                inputs: Any = (_args(product)[0], residual)
                return Group(layer, inputs, (node,), frozenset(absorbed))
        return None

    def norm(self, node: Node) -> Group | None:
        """Root mean square norms that round before they scale (Llama), or scale by one more than a weight (Gemma)."""
        match = self._scaled(node)
        if match is None:
            return None
        scaled, weight, is_offset = match
        hidden, scale = _pair(scaled, lambda part: part.target is aten.rsqrt.default)
        if hidden is None or scale is None:
            return None
        shifted = _args(scale)[0]
        if not isinstance(shifted, Node) or shifted.target is not aten.add.Tensor:
            return None
        mean, epsilon = _args(shifted)[:2]
        if not isinstance(mean, Node) or mean.target is not aten.mean.dim or not isinstance(epsilon, float):
            return None
        square, dims, *keeps = _args(mean)
        if list(dims) != [-1] or keeps[:1] != [True] or mean.kwargs:
            return None
        if not isinstance(square, Node) or square.target is not aten.pow.Tensor_Scalar or _args(square)[1] != 2:
            return None
        source = _before_casts(hidden)
        if _args(square)[0] is not hidden or hidden.meta["val"].dtype != torch.float32 or not _are_alike(source, node):
            return None
        absorbed = self._between(node, {source, weight})
        if not self._is_closed(absorbed, (node,)):
            return None
        call = RmsNorm(self._graph.tensors[weight], epsilon, is_offset)
        return Group(call, (source,), (node,), frozenset(absorbed))

    def _scaled(self, node: Node) -> tuple[Node, Node, bool] | None:
        """`x / rms(x)` before its weight, the weight, and whether one is added to that."""
        inner = _before_casts(node)
        if inner.target is not aten.mul.Tensor:
            return None
        for weight, other in (_args(inner)[:2], _args(inner)[1::-1]):
            if not isinstance(weight, Node) or not isinstance(other, Node):
                continue
            if weight in self._graph.tensors and inner is node:
                return _before_casts(other), weight, False
            if weight.target is aten.add.Tensor and 1.0 in _args(weight) and not weight.kwargs:
                one_more = next((part for part in _args(weight) if isinstance(part, Node)), None)
                plain = None if one_more is None else _before_casts(one_more)
                if plain in self._graph.tensors and other.target is aten.mul.Tensor:
                    assert plain is not None
                    return other, plain, True
        return None

    def rotary(self, node: Node) -> Group | None:
        """`x cos + (-x2, x1) sin` for the halves x1 and x2 of x (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""
        if node.target is not aten.add.Tensor or node.kwargs:
            return None
        for straight, turned in (_args(node)[:2], _args(node)[1::-1]):
            if not _is_call(straight, aten.mul.Tensor) or not _is_call(turned, aten.mul.Tensor):
                continue
            halves, sine = _pair(turned, lambda part: part.target is not aten.cat.default)
            source = None if halves is None else _turned(halves)
            cosine = next((part for part in _args(straight) if part is not source), None)
            if source is None or source not in _args(straight) or not isinstance(cosine, Node):
                continue
            if sine is None or not _are_alike(source, node) or cosine.meta["val"].shape != sine.meta["val"].shape:
                continue
            absorbed = self._between(node, {source, cosine, sine})
            if self._is_closed(absorbed, (node,)):
                return Group(Supplied("rotary"), (source, cosine, sine), (node,), frozenset(absorbed))
        return None

    def linears_of_one_input(self) -> Iterator[Group]:
        """Linears that no group has yet: those together that read the same hidden states."""
        by_input: dict[Node, list[tuple[Node, LinearLayer]]] = {}
        for node in self._graph.nodes:
            if node not in self.groups and (layer := self.linear(node)) is not None:
                by_input.setdefault(_args(node)[0], []).append((node, layer))
        for hidden, linears in by_input.items():
            nodes, layers = tuple(node for node, _ in linears), tuple(layer for _, layer in linears)
            call = LinearLayers(layers) if len(layers) > 1 else layers[0]
            yield Group(call, (hidden,), nodes, frozenset(nodes))

    def rotary_attentions(self) -> Iterator[Group]:
        """Attention whose queries and keys are turned just before, by the same angles."""
        for node in self._graph.nodes:
            if node.target is not attention_marker._opoverload:
                continue
            query, key, value, sinks, _ = _args(node)
            turned = [self.groups.get(part) for part in (query, key)]
            first, second = turned
            if first is None or second is None or first.call != Supplied("rotary") or second.call != first.call:
                continue
            if first.inputs[1:] != second.inputs[1:] or any(len(part.users) > 1 for part in (query, key)):
                continue
            inputs: Any = (
                first.inputs[0],
                second.inputs[0],
                value,
                *first.inputs[1:],
                *([] if sinks is None else [sinks]),
            )
            yield Group(Supplied("attention"), inputs, (node,), frozenset({node, *first.absorbed, *second.absorbed}))

    def _between(self, last: Node, sources: set[Node]) -> set[Node]:
        """What `last` is computed by, from `sources` on; all else that it reads is in it."""
        found, waiting = {last}, [last]
        while waiting:
            for parent in waiting.pop().all_input_nodes:
                if parent not in sources and parent not in found:
                    found.add(parent)
                    waiting.append(parent)
        return found

    def _is_closed(self, nodes: Iterable[Node], results: tuple[Node, ...]) -> bool:
        """Whether nobody else reads what is inside, nor is any of it a group's already or another stage's."""
        inside = set(nodes)
        return all(
            node in self._own
            and node not in self.groups
            and (node in results or (node not in self._kept and all(user in inside for user in self._users(node))))
            for node in inside
        )

    def _users(self, node: Node) -> Iterator[Node]:
        return (user for user in node.users if user in self._own)


def _args(node: Node) -> tuple[Any, ...]:
    arguments: tuple[Any, ...] = node.args
    return arguments


def _is_call(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target and not node.kwargs


def _activation(node: Node) -> str | None:
    name = _ACTIVATIONS.get(node.target)
    if name == "gelu":
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else None
    return name


def _are_alike(*nodes: Any) -> bool:
    """Of the same shape and type."""
    values = [node.meta["val"] for node in nodes]
    return all(value.dtype == values[0].dtype and value.shape == values[0].shape for value in values)


def _before_casts(node: Node) -> Node:
    while node.target in _CASTS and isinstance(_args(node)[0], Node):
        node = _args(node)[0]
    return node


def _pair(product: Any, is_second: Any) -> tuple[Node | None, Node | None]:
    """The two factors of a product, the one that `is_second` tells last."""
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor or product.kwargs:
        return None, None
    first, second = _args(product)[:2]
    if not isinstance(first, Node) or not isinstance(second, Node):
        return None, None
    if is_second(second):
        return first, second
    return (second, first) if is_second(first) else (None, None)


def _turned(node: Node) -> Node | None:
    """x, where `node` is (-x2, x1)."""
    if not _is_call(node, aten.cat.default) or len(_args(node)) != 2 or _args(node)[1] not in (-1, 3):
        return None
    negative, first = _args(node)[0]
    if not _is_call(negative, aten.neg.default) or not _is_call(first, aten.slice.Tensor):
        return None
    second = _args(negative)[0]
    if not _is_call(second, aten.slice.Tensor) or _args(second)[0] is not _args(first)[0]:
        return None
    source = _args(first)[0]
    width = source.meta["val"].shape[-1]
    ranges = [_range(part, width) for part in (first, second)]
    if not isinstance(width, int) or ranges != [(0, width // 2), (width // 2, width)]:
        return None
    return source if isinstance(source, Node) else None


def _range(node: Node, width: int) -> tuple[int, int] | None:
    """Which of the last dim's numbers a slice takes."""
    if len(_args(node)) != 4 or _args(node)[1] not in (-1, node.meta["val"].ndim - 1):
        return None
    start, end = _args(node)[2:]
    return slice(start, end).indices(width)[:2]
