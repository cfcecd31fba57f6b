"""Groups that follow each other in a decoder layer and become one call: its attention, and its gated feed-forward.

A norm, the linears that read it, what is made of those, and the linear behind that. Between two of these sublayers only
the residual stream is left, to which each adds, so those of a whole stage are one stack. Where one of the parts is
missing, or others read what lies between, the groups of `fuse` stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ts_parallel.partition.graph.fuse import Group
from ts_parallel.partition.graph.stages import StageGraph
from ts_parallel.partition.graph.trace import all_reduce_marker
from ts_parallel.partition.program import (
    AttentionSublayer,
    GatedLinear,
    GatedSublayer,
    LinearLayer,
    LinearLayers,
    RmsNorm,
    Sublayer,
    SublayerStack,
    Supplied,
)

aten = torch.ops.aten

_RESHAPES = {aten.view.default, aten.reshape.default, aten.contiguous.default}


def find_sublayers(graph: StageGraph, groups: Mapping[Node, Group]) -> dict[Node, Group]:
    """`groups` by node, those that are parts of a sublayer, or of a stack of some, replaced by it."""
    finder = _SublayerFinder(graph, groups)
    found = dict(groups)
    sublayers = []
    for group in dict.fromkeys(groups.values()):
        sublayer = finder.gated(group) or finder.attention(group)
        if sublayer is not None:
            sublayers.append(sublayer)
            found |= dict.fromkeys(sublayer.absorbed, sublayer)
    for stack in finder.stacks(sublayers):
        found |= dict.fromkeys(stack.absorbed, stack)
    return found


@dataclass(frozen=True)
class _Addition:
    """A sublayer that adds to what it reads."""

    sublayer: Sublayer
    hidden: Node
    angles: tuple[Node, ...]
    result: Node
    absorbed: frozenset[Node]
    is_part: bool  # of what is added, which is summed over the ranks before


class _SublayerFinder:
    """Looks for sublayers among the groups, which it leaves as they are."""

    def __init__(self, graph: StageGraph, groups: Mapping[Node, Group]) -> None:
        self._groups = groups
        self._own = set(graph.nodes)
        self._places = {node: place for place, node in enumerate(graph.nodes)}
        self._kept = set(graph.sent)
        self._site_numbers = graph.site_numbers

    def gated(self, group: Group) -> Group | None:
        if not isinstance(group.call, GatedLinear):
            return None
        norm, last = self._norm(group), self._last(group.results[0])
        if norm is None or last is None:
            return None
        assert isinstance(norm.call, RmsNorm) and isinstance(last.call, LinearLayer)
        call = GatedSublayer(norm.call, group.call, last.call)
        absorbed = norm.absorbed | group.absorbed | last.absorbed
        return Group(call, (*norm.inputs, *last.inputs[1:]), last.results, absorbed)

    def attention(self, group: Group) -> Group | None:
        if group.call != Supplied("attention") or len(group.inputs) != 5:  # the sixth is sinks
            return None
        *heads, cosine, sine = group.inputs
        (result,) = group.results
        paths = [self._path_of_heads(each, group) for each in heads]
        linears = self._groups.get(paths[0][-1]) if all(paths) else None
        if linears is None or not isinstance(linears.call, LinearLayers):
            return None
        if linears.results != tuple(path[-1] for path in paths):
            return None
        outward = self._path_outward(result)
        norm, last = self._norm(linears), self._last(outward[-1]) if outward else None
        if norm is None or last is None:
            return None
        assert isinstance(norm.call, RmsNorm) and isinstance(last.call, LinearLayer)
        call = AttentionSublayer(
            norm.call,
            linears.call,
            last.call,
            self._site_numbers[int(result.args[-1])],  # type: ignore[arg-type]
            head_dim=heads[0].meta["val"].shape[-1],
            value_dim=heads[2].meta["val"].shape[-1],
        )
        between = {node for path in (*paths, outward) for node in path}
        absorbed = norm.absorbed | linears.absorbed | group.absorbed | between | last.absorbed
        return Group(call, (*norm.inputs, cosine, sine, *last.inputs[1:]), last.results, absorbed)

    def stacks(self, sublayers: Sequence[Group]) -> list[Group]:
        """Those of at least two sublayers that can follow each other without anybody else."""
        additions = [addition for group in sublayers if (addition := self._addition(group)) is not None]
        additions.sort(key=lambda addition: self._places[addition.result])  # so none begins in the middle of another
        by_hidden = {addition.hidden: addition for addition in additions}
        found, taken = [], set[Node]()
        for first in additions:
            if first.result in taken:
                continue
            own, angles = [first], first.angles
            while (following := by_hidden.get(own[-1].result)) is not None and self._can_follow(own[-1], following):
                if angles and following.angles and not all(map(_are_same, angles, following.angles)):
                    break
                own.append(following)
                angles = angles or following.angles
            taken |= {addition.result for addition in own}
            if len(own) > 1 and angles:
                found.append(self._stack(own, angles))
        return found

    def _stack(self, own: Sequence[_Addition], angles: tuple[Node, ...]) -> Group:
        call = SublayerStack(tuple(addition.sublayer for addition in own), own[0].is_part)
        absorbed = frozenset[Node]().union(*(addition.absorbed for addition in own))
        others = {node for addition in own for node in addition.angles} - set(angles)
        absorbed |= {node for node in others if node not in self._kept and self._readers(node) <= absorbed}
        return Group(call, (own[0].hidden, *angles), (own[-1].result,), absorbed)

    def _can_follow(self, before: _Addition, following: _Addition) -> bool:
        """Whether nobody else reads what lies between."""
        is_seen = before.result in self._kept or not self._readers(before.result) <= following.absorbed
        return not is_seen and before.is_part == following.is_part

    def _addition(self, group: Group) -> _Addition | None:
        """A sublayer's group as an addition: it has the residual, or behind it the ranks' sum is added to it."""
        sublayer = group.call
        assert isinstance(sublayer, AttentionSublayer | GatedSublayer)
        num_angles = 2 if isinstance(sublayer, AttentionSublayer) else 0
        hidden, angles, added = group.inputs[0], group.inputs[1 : 1 + num_angles], group.inputs[1 + num_angles :]
        (result,) = group.results
        if added:
            is_whole = added == (hidden,)
            return _Addition(sublayer, hidden, angles, result, group.absorbed, is_part=False) if is_whole else None
        between = [result]
        for target in (all_reduce_marker._opoverload, aten.add.Tensor):
            if not self._are_inner(between[-1]):
                return None
            (reader,) = self._readers(between[-1])
            if reader.target is not target or reader.kwargs:
                return None
            between.append(reader)
        reduced, total = between[1:]
        dtypes = {node.meta["val"].dtype for node in (hidden, reduced, total)}
        if set(total.args) != {hidden, reduced} or len(dtypes) > 1:
            return None
        return _Addition(sublayer, hidden, angles, total, group.absorbed | {reduced, total}, is_part=True)

    def _norm(self, group: Group) -> Group | None:
        """The norm whose result `group`, which has one input, reads and nobody else."""
        (hidden,) = group.inputs
        norm = self._groups.get(hidden)
        if norm is None or not isinstance(norm.call, RmsNorm) or hidden in self._kept:
            return None
        return norm if self._readers(hidden) <= group.absorbed else None

    def _last(self, result: Node) -> Group | None:
        """The linear that reads `result`, and nobody else does."""
        readers = self._readers(result)
        last = self._groups.get(next(iter(readers))) if readers else None
        if last is None or not isinstance(last.call, LinearLayer) or result in self._kept:
            return None
        return last if readers <= last.absorbed and result is last.inputs[0] and result not in last.inputs[1:] else None

    def _path_of_heads(self, heads: Node, attention: Group) -> list[Node]:
        """From heads `[1, H, T, D]`, which `attention` reads, back to the linear's outputs `[1, T, H D]` of which they
        are a view; nothing where they are none."""
        view = heads.args[0]
        if heads.target is not aten.transpose.int or heads.args[1:] != (1, 2) or not isinstance(view, Node):
            return []
        source = view.args[0]
        if view.target not in _RESHAPES or not isinstance(source, Node) or not self._are_inner(view, source):
            return []
        if heads in self._kept or not self._readers(heads) <= attention.absorbed:
            return []
        shape, whole = view.meta["val"].shape, source.meta["val"].shape
        return [heads, view, source] if len(shape) == 4 and whole[-1] == shape[2] * shape[3] else []

    def _path_outward(self, result: Node) -> list[Node]:
        """From what attention gives, `[1, T, H, E]`, to the same as `[1, T, H E]`; nothing where it does not."""
        path = [result]
        while self._are_inner(path[-1]):
            (reader,) = self._readers(path[-1])
            if reader.target not in _RESHAPES:
                break
            path.append(reader)
        shape, whole = path[-1].meta["val"].shape, result.meta["val"].shape
        return path if len(shape) == 3 and shape[-1] == whole[-1] * whole[-2] else []

    def _are_inner(self, *nodes: Node) -> bool:
        """Whether each has one reader, in this stage."""
        return all(node in self._own and node not in self._kept and len(self._readers(node)) == 1 for node in nodes)

    def _readers(self, node: Node) -> set[Node]:
        return {user for user in node.users if user in self._own}


def _are_same(node: Node, other: Node) -> bool:
    """Whether two nodes have the same numbers: each layer gives the angles a dimension of its own making."""
    if node is other:
        return True
    return node.target is other.target is aten.unsqueeze.default and node.args == other.args
