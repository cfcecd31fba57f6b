"""One traced graph → the flat graphs of its pipeline stages, cut at layer borders.

A node's *place* is its layer; what runs before the first layer has place -1, what runs after the last one the number of
layers. A node that depends on inputs and buffers alone, or on weights alone, has no place: each stage that needs it
computes it again, so that usually one tensor, the hidden states, crosses from stage to stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import nn
from torch.fx import Node
from torch.utils._sympy.printers import PythonPrinter

from ts_parallel.errors import PlanError
from ts_parallel.partition.graph.trace import TracedModel
from ts_parallel.partition.program import AttentionSite, Crossing

_EMBEDDINGS = {torch.ops.aten.embedding.default}


@dataclass(frozen=True)
class StageGraph:
    """What one stage computes: `nodes` in order, over its placeholders and what it receives.

    `tensors` maps a placeholder to the name of its parameter or buffer, `inputs` to the name of its model input.
    """

    nodes: tuple[Node, ...]
    tensors: Mapping[Node, str]
    constants: Mapping[Node, torch.Tensor]
    inputs: Mapping[Node, str]
    received: tuple[Node, ...]
    sent: tuple[Node, ...]
    """What goes to the next stage; on the last one, the model's outputs."""
    crossings: Mapping[Node, Crossing]
    sites: tuple[AttentionSite, ...]
    """Its attention calls, in call order."""
    site_numbers: Mapping[int, int]
    """Number of a call in the whole model → its number among `sites`."""


@dataclass(frozen=True)
class LayerCosts:
    """What the parts of a model weigh on one rank: before the first layer, each layer, after the last one."""

    num_bytes: tuple[int, ...]
    """Bytes of parameters."""
    bytes_read: tuple[int, ...]
    """Bytes of parameters that a step reads: all but embeddings, of which it reads rows."""


def find_layers(model: nn.Module, num_layers: int) -> tuple[str, int]:
    """Name of the list of the model's layers, and how many there are.

    A model without a list of as many modules as it has layers counts as one layer: it can be run, but not cut.
    """
    for name, module in model.named_modules():
        if num_layers and isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name, num_layers
    return "", 1


class Places:
    """Where each node of a traced model belongs."""

    def __init__(self, traced: TracedModel, layers: str, num_layers: int) -> None:
        self.traced = traced
        self.num_layers = num_layers
        self._of: dict[Node, int] = {}
        self._has_weight: dict[Node, bool] = {}
        self._has_input: dict[Node, bool] = {}
        pattern = re.compile(re.escape(layers) + r"\.(\d+)(\.|$)" if layers else r"(?!)")
        for node in traced.graph.nodes:
            if node.op != "call_function":
                self._has_weight[node] = traced.tensors.get(node) in traced.parameters
                self._has_input[node] = node in traced.inputs
                continue
            parents = node.all_input_nodes
            self._has_weight[node] = any(self._has_weight[parent] for parent in parents)
            self._has_input[node] = any(self._has_input[parent] for parent in parents)
            if self._has_weight[node] and self._has_input[node]:
                match = pattern.match(traced.modules.get(node, ""))
                follows = any(self._of.get(parent, -1) >= 0 for parent in parents)
                self._of[node] = int(match[1]) if match else self.num_layers if follows else -1

    def of(self, node: Node) -> int | None:
        """Its place; None where every stage may compute it."""
        return self._of.get(node)

    def of_parameters(self) -> dict[str, set[tuple[int, bool]]]:
        """Parameter → the places that use it, each with whether it is read whole there."""
        uses: dict[str, set[tuple[int, bool]]] = {}
        for placeholder, name in self.traced.tensors.items():
            if name not in self.traced.parameters:
                continue
            waiting, seen = [placeholder], {placeholder}
            while waiting:  # through nodes without a place: a transposed weight, a norm's `1 + weight`
                node = waiting.pop()
                for user in node.users:
                    place = self.of(user)
                    if place is not None:
                        uses.setdefault(name, set()).add((place, user.target not in _EMBEDDINGS))
                    elif user not in seen:
                        seen.add(user)
                        waiting.append(user)
        return uses


def weigh(places: Places, num_bytes: Mapping[str, int]) -> LayerCosts:
    """`num_bytes` are those of each parameter on one rank."""
    held, read = [0] * (places.num_layers + 2), [0] * (places.num_layers + 2)
    for name, uses in places.of_parameters().items():
        for place in {place for place, _ in uses}:
            held[place + 1] += num_bytes[name]
        for place in {place for place, is_read_whole in uses if is_read_whole}:
            read[place + 1] += num_bytes[name]
    return LayerCosts(tuple(held), tuple(read))


def choose_borders(costs: LayerCosts, num_stages: int) -> tuple[int, ...]:
    """The first layer of each stage after the first, so that the heaviest stage is as light as can be.

    A layer weighs half by the bytes it holds, half by the bytes that a step reads of it: memory and time of a stage.

    Raises:
        PlanError: there are fewer layers than stages.
    """
    num_layers = len(costs.num_bytes) - 2
    if num_stages > num_layers:
        raise PlanError(
            f"{num_layers} layer{'s' * (num_layers > 1)} cannot be cut into {num_stages} stages: lower "
            "pipeline_parallel_size × virtual_stages"
        )
    weights = shares(costs)
    layers = [weights[0] + weights[1], *weights[2:-1]] if num_layers > 1 else [sum(weights)]
    layers[-1] += weights[-1] if num_layers > 1 else 0
    return _most_even(layers, num_stages)


def shares(costs: LayerCosts) -> list[float]:
    """The weight of each part, of 1 for the whole model."""
    held, read = sum(costs.num_bytes) or 1, sum(costs.bytes_read) or 1
    return [a / held / 2 + b / read / 2 for a, b in zip(costs.num_bytes, costs.bytes_read, strict=True)]


def _most_even(weights: Sequence[float], num_parts: int) -> tuple[int, ...]:
    """Where to cut a row of weights into parts, none empty, so that the heaviest is lightest."""
    count = len(weights)
    sums = [0.0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]]
    best = {(end, 1): (sums[end], (0,)) for end in range(1, count + 1)}
    for parts in range(2, num_parts + 1):
        for end in range(parts, count + 1):
            best[end, parts] = min(
                (max(best[start, parts - 1][0], sums[end] - sums[start]), (*best[start, parts - 1][1], start))
                for start in range(parts - 1, end)
            )
    return best[count, num_parts][1][1:]


def check_borders(borders: Sequence[int], num_layers: int, num_stages: int) -> tuple[int, ...]:
    """The user's own `split_points`, if they fit.

    Raises:
        PlanError: they are not `num_stages - 1` rising numbers of layers.
    """
    if len(borders) != num_stages - 1:
        raise PlanError(f"split_points has {len(borders)} entries, {num_stages} stages need {num_stages - 1}")
    if any(b <= a for a, b in pairwise([0, *borders])) or (borders and borders[-1] >= num_layers):
        raise PlanError(
            f"split_points {list(borders)} must rise from 1 to at most {num_layers - 1}, as the model has "
            f"{num_layers} layers"
        )
    return tuple(borders)


def cut(
    places: Places, borders: Sequence[int], sites: Sequence[AttentionSite], attention: object = None
) -> tuple[StageGraph, ...]:
    """The stages' graphs. `borders` are the first layers of all stages but the first.

    Args:
        attention: the operation whose last argument is the number of a site.

    Raises:
        PlanError: a stage would need what a later one computes.
    """
    traced, num_stages = places.traced, len(borders) + 1
    stage_of = {place: sum(place >= border for border in borders) for place in range(places.num_layers)}
    stage_of |= {-1: 0, places.num_layers: num_stages - 1}
    placed = {node: stage_of[place] for node in traced.graph.nodes if (place := places.of(node)) is not None}
    needed, received = _needs(traced, placed, num_stages)
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    crossings = {node: _crossing(traced, node) for nodes in (*received, traced.outputs) for node in nodes}
    stages = []
    for stage in range(num_stages):
        nodes = sorted(needed[stage], key=order.__getitem__)
        calls = [node for node in nodes if node.target is attention]
        numbers = {int(node.args[-1]): index for index, node in enumerate(calls)}  # type: ignore[arg-type]
        sent = sorted(received[stage + 1], key=order.__getitem__) if stage + 1 < num_stages else traced.outputs
        stages.append(
            StageGraph(
                nodes=tuple(node for node in nodes if node.op == "call_function"),
                tensors={node: traced.tensors[node] for node in nodes if node in traced.tensors},
                constants={node: traced.constants[node] for node in nodes if node in traced.constants},
                inputs={node: traced.inputs[node] for node in nodes if node in traced.inputs},
                received=tuple(sorted(received[stage], key=order.__getitem__)),
                sent=tuple(sent),
                crossings=crossings,
                sites=tuple(sites[number] for number in numbers),
                site_numbers=numbers,
            )
        )
    return tuple(stages)


def _needs(traced: TracedModel, placed: Mapping[Node, int], num_stages: int) -> tuple[list[set[Node]], list[set[Node]]]:
    """For each stage the nodes that it computes or looks up, and those that it receives (if only to pass them on)."""
    needed: list[set[Node]] = [set() for _ in range(num_stages)]
    received: list[set[Node]] = [set() for _ in range(num_stages + 1)]
    for stage in reversed(range(num_stages)):
        wanted = received[stage + 1] if stage + 1 < num_stages else set(traced.outputs)
        waiting = list(wanted)
        seen: set[Node] = set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            at = placed.get(node, stage)
            if at > stage:
                raise PlanError(
                    f"stage {stage} needs {node.name!r}, which a later stage computes: choose other borders"
                )
            if at < stage:
                received[stage].add(node)
            else:
                needed[stage].add(node)
                waiting += node.all_input_nodes
    return needed, received[:num_stages]


def _crossing(traced: TracedModel, node: Node) -> Crossing:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise PlanError(f"{node.name!r} of {traced.modules.get(node)!r} is no tensor and cannot cross between stages")
    return Crossing(node.name, value.dtype, tuple(_dim(traced, size) for size in value.shape))


def _dim(traced: TracedModel, size: int | torch.SymInt) -> int | str:
    """How to find a size out from the shapes of the model inputs: see `Crossing.dims`."""
    if isinstance(size, int):
        return size
    places: dict[Any, sympy.Symbol] = {}
    for placeholder, name in traced.inputs.items():
        for dim, own in enumerate(placeholder.meta["val"].shape):
            if isinstance(own, torch.SymInt):
                places.setdefault(own.node.expr, sympy.Symbol(f"{name}[{dim}]", integer=True, positive=True))
    expression: str = PythonPrinter().doprint(size.node.expr.subs(places))
    return expression
