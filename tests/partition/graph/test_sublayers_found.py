"""Sublayers of a decoder are found where their parts are, and left apart where others read what lies between."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from test_fuse import graph_of
from torch import nn
from whole_model import stage_model

from ts_parallel.partition.build import cut_causal_lm, shard_causal_lm
from ts_parallel.partition.graph import sublayers
from ts_parallel.partition.graph.fuse import find_groups
from ts_parallel.partition.graph.stages import StageGraph
from ts_parallel.partition.graph.sublayers import find_sublayers
from ts_parallel.partition.graph.trace import TracedGroup
from ts_parallel.partition.program import AttentionSublayer, GatedSublayer, LinearLayer, PipelinePlace, SublayerStack


def kinds(graph: StageGraph) -> Counter[str]:
    groups = dict.fromkeys(find_sublayers(graph, find_groups(graph)).values())
    return Counter(type(group.call).__name__ for group in groups)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"SublayerStack": 1, "LinearLayer": 1, "RmsNorm": 1}),
        ("gemma2", {"AttentionSublayer": 2, "GatedSublayer": 2, "LinearLayer": 1, "RmsNorm": 5}),
        ("qwen3", {"LinearLayers": 2, "LinearLayer": 3, "GatedSublayer": 2, "RmsNorm": 7, "Supplied": 2}),
    ],
)
def test_layer_of_a_family_is_as_few_calls_as_can_be(family: str, expected: dict[str, int]) -> None:
    (graph,) = stage_model(FAMILIES[family](num_hidden_layers=2), dtype=torch.bfloat16).stages
    assert kinds(graph) == expected


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_sublayers_of_a_stage_are_one_stack(num_stages: int, size: int) -> None:
    config = FAMILIES["llama"](num_hidden_layers=4)
    sharded = shard_causal_lm(config, torch.bfloat16, TracedGroup(0, size))
    for graph in cut_causal_lm(sharded, PipelinePlace(num_ranks=num_stages)).stages:
        (stack,) = stacks_of(graph)
        assert len(stack.sublayers) == 8 // num_stages
        assert stack.are_parts == (size > 1)


def test_state_that_others_read_too_ends_a_stack() -> None:
    (graph,) = stage_model(FAMILIES["llama"](num_hidden_layers=3), dtype=torch.bfloat16).stages
    groups = find_groups(graph)
    linears = [node for node in graph.nodes if node in groups and isinstance(groups[node].call, LinearLayer)]
    seen = [node for node in dict.fromkeys(groups[linear].results[0] for linear in linears)][2]  # of the second layer
    first, second = stacks_of(replace(graph, sent=(*graph.sent, seen)))
    assert (len(first.sublayers), len(second.sublayers)) == (3, 3)


def test_sublayers_with_other_angles_begin_another_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    (graph,) = stage_model(FAMILIES["llama"](num_hidden_layers=3), dtype=torch.bfloat16).stages
    monkeypatch.setattr(sublayers, "_are_same", lambda node, other: node is other)
    stacks = stacks_of(graph)
    assert [[type(sublayer) for sublayer in stack.sublayers] for stack in stacks] == [
        [AttentionSublayer, GatedSublayer]
    ] * 3


def stacks_of(graph: StageGraph) -> list[SublayerStack]:
    groups = dict.fromkeys(find_sublayers(graph, find_groups(graph)).values())
    return [group.call for group in groups if isinstance(group.call, SublayerStack)]


class FeedForward(nn.Module):
    """A layer's feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        self.gate, self.up, self.down = (nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(3))

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        exact = hidden.to(torch.float32)
        return self.scale * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        return hidden + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


class NormSeenTwice(FeedForward):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        return normed + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


class ProductSeenTwice(FeedForward):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        product = nn.functional.silu(self.gate(normed)) * self.up(normed)
        return product + self.down(product)


class WithoutNorm(FeedForward):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


@pytest.mark.parametrize(
    ("module", "num_sublayers"), [(FeedForward, 1), (NormSeenTwice, 0), (ProductSeenTwice, 0), (WithoutNorm, 0)]
)
def test_sublayer_of_which_others_read_the_inside_stays_in_parts(module: type[FeedForward], num_sublayers: int) -> None:
    graph = graph_of(module(), torch.zeros(3, 8, dtype=torch.bfloat16))
    found = kinds(replace(graph, nodes=tuple(node for node in graph.nodes if node.users)))  # without assertions
    assert found["GatedSublayer"] == num_sublayers
    assert found["GatedLinear"] == 1 - num_sublayers
