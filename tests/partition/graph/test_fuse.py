"""Groups of operations that one call does: found where they are, and nowhere else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.export import export
from whole_model import stage_model

from ts_parallel.partition.graph.fuse import Group, find_groups
from ts_parallel.partition.graph.stages import StageGraph
from ts_parallel.partition.program import GatedLinear, LinearLayer, LinearLayers, RmsNorm, Supplied


def groups_of(graph: StageGraph) -> list[Group]:
    return list(dict.fromkeys(find_groups(graph).values()))


def kinds(graph: StageGraph) -> Counter[str]:
    names = (
        group.call.name if isinstance(group.call, Supplied) else type(group.call).__name__ for group in groups_of(graph)
    )
    return Counter(names)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"LinearLayers": 2, "GatedLinear": 2, "LinearLayer": 5, "RmsNorm": 5, "attention": 2}),
        ("qwen3", {"LinearLayers": 2, "GatedLinear": 2, "LinearLayer": 5, "RmsNorm": 9, "attention": 2}),
        ("gemma2", {"LinearLayers": 2, "GatedLinear": 2, "LinearLayer": 5, "RmsNorm": 9, "attention": 2}),
    ],
)
def test_every_layer_of_a_family_is_a_few_calls(family: str, expected: dict[str, int]) -> None:
    (graph,) = stage_model(FAMILIES[family](num_hidden_layers=2), dtype=torch.bfloat16).stages
    assert kinds(graph) == expected
    norms = [group.call for group in groups_of(graph) if isinstance(group.call, RmsNorm)]
    assert all(norm.is_offset == (family == "gemma2") for norm in norms)


def graph_of(module: nn.Module, *inputs: torch.Tensor) -> StageGraph:
    """All of a module's graph, its weights by name and its inputs in order."""
    program = export(module, inputs)
    names = program.graph_signature.inputs_to_parameters
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    return StageGraph(
        nodes=tuple(node for node in program.graph.nodes if node.op == "call_function"),
        tensors={node: names[node.name] for node in placeholders if node.name in names},
        constants={},
        inputs={node: node.name for node in placeholders if node.name not in names},
        received=(),
        sent=tuple(output.args[0]),
        crossings={},
        sites=(),
        site_numbers={},
    )


class Pair(nn.Module):
    """Two linears and what is made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)


class Gate(Pair):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.two(hidden) * nn.functional.silu(self.one(hidden))


class GateSeenTwice(Pair):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.silu(self.one(hidden))
        return self.two(hidden) * gate + gate


class GateOfTwoInputs(Pair):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.two(hidden + 1) * nn.functional.silu(self.one(hidden))


class ExactGelu(Pair):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.two(hidden) * nn.functional.gelu(self.one(hidden))


class Residual(Pair):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.one(hidden)


class WideResidual(Pair):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.unsqueeze(0) + self.one(hidden)


class SharedWeight(Pair):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.two.weight) @ self.two.weight


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Gate, [GatedLinear(LinearLayer("one.weight", "one.bias"), LinearLayer("two.weight", None), "silu")]),
        (GateSeenTwice, [LinearLayers((LinearLayer("one.weight", "one.bias"), LinearLayer("two.weight", None)))]),
        (GateOfTwoInputs, [LinearLayer("two.weight", None), LinearLayer("one.weight", "one.bias")]),
        (ExactGelu, [LinearLayers((LinearLayer("two.weight", None), LinearLayer("one.weight", "one.bias")))]),
        (Residual, [LinearLayer("one.weight", "one.bias")]),
        (WideResidual, [LinearLayer("one.weight", "one.bias")]),
        (SharedWeight, []),
    ],
)
def test_what_another_reads_inside_is_left_apart(module: type[Pair], expected: list[object]) -> None:
    graph = graph_of(module(), torch.zeros(3, 8))
    assert [group.call for group in groups_of(graph)] == expected
    has_residual = [len(group.inputs) == 2 for group in groups_of(graph)]
    assert any(has_residual) == (module is Residual)
