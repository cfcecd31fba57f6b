"""Stages are as even as can be, hold what they need and no more, and are the plain model when run in a row."""

from __future__ import annotations

from functools import cache
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, PretrainedConfig
from whole_model import ALONE, plain_logits, plain_model, run_stages, sequence, tensors_of

from ts_parallel.errors import PlanError
from ts_parallel.partition.build import (
    ShardedModel,
    StagedModel,
    all_tensors,
    cut_causal_lm,
    cut_into_stages,
    program_of,
    shard_causal_lm,
)
from ts_parallel.partition.graph.stage_code import write_stage
from ts_parallel.partition.graph.stages import (
    LayerCosts,
    Places,
    check_borders,
    choose_borders,
    cut,
    find_layers,
    shares,
)
from ts_parallel.partition.graph.trace import TracedGroup, TracedModel
from ts_parallel.partition.model.causal_lm import trace_causal_lm
from ts_parallel.partition.program import TOKEN_IDS, AttentionSite, PipelinePlace

NUM_LAYERS = 4
TIED = ["gpt2", "gemma2", "opt", "starcoder2"]


@cache
def traced(family: str) -> tuple[ShardedModel, TracedModel, tuple[AttentionSite, ...]]:
    """Cutting changes nothing of a trace, so tests share it."""
    sharded = shard_causal_lm(FAMILIES[family](), torch.float32, ALONE)
    return sharded, *trace_causal_lm(sharded.model, NUM_LAYERS)


def staged(family: str, num_stages: int, split_points: tuple[int, ...] | None = None) -> StagedModel:
    sharded, graph, sites = traced(family)
    return cut_into_stages(sharded, graph, PipelinePlace(0, num_stages, split_points=split_points), sites)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_in_a_row_are_the_plain_model_bit_for_bit(family: str) -> None:
    plain, inputs = plain_model(FAMILIES[family]()), sequence(20)
    expected = plain_logits(plain, inputs[TOKEN_IDS])
    for num_stages in (1, 2, 4):
        stages = staged(family, num_stages).stages
        assert torch.equal(run_stages(stages, tensors_of(plain), inputs), expected), num_stages


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_alone_cross_from_stage_to_stage(family: str) -> None:
    stages = staged(family, 4).stages
    assert stages[0].received == ()
    for before, after in pairwise(stages):
        assert before.sent == after.received
        (node,) = after.received
        for length in (1, 2, 7, 40):
            sizes = {"token_ids": (1, length), "positions": (1, length), "rows": (1,)}
            assert after.crossings[node].shape(sizes) == (1, length, 64)
        assert after.crossings[node].dtype == torch.float32
    (output,) = stages[-1].sent
    sizes = {"token_ids": (1, 9), "positions": (1, 9), "rows": (5,)}
    assert stages[-1].crossings[output].shape(sizes) == (1, 5, FAMILIES[family]().vocab_size)


def test_crossing_tensors_have_the_models_dtype() -> None:
    sharded = shard_causal_lm(FAMILIES["gpt2"](num_hidden_layers=2), torch.bfloat16, ALONE)
    _, last = cut_causal_lm(sharded, PipelinePlace(0, 2)).stages
    assert [last.crossings[node].dtype for node in last.received] == [torch.bfloat16]


def gemma3n() -> PretrainedConfig:
    kinds = ["sliding_attention", "full_attention"] * 3
    return CONFIG_MAPPING["gemma3n_text"](
        hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=[96] * 6, activation_sparsity_pattern=[0.0] * 6, vocab_size=97, laurel_rank=8,
        vocab_size_per_layer_input=97, hidden_size_per_layer_input=8, num_kv_shared_layers=2, sliding_window=8,
        layer_types=kinds, pad_token_id=None,
    )  # fmt: skip


def test_what_several_later_stages_need_is_passed_on() -> None:
    """Gemma 3n's layers take inputs of their own, and the last two the keys and values of earlier ones."""
    plain, inputs = plain_model(gemma3n()), sequence(20)
    sharded = shard_causal_lm(gemma3n(), torch.float32, ALONE)
    graph, sites = trace_causal_lm(sharded.model, 6)
    for num_stages in (2, 3):
        stages = cut_into_stages(sharded, graph, PipelinePlace(0, num_stages), sites).stages
        assert len(stages[-1].received) > 1
        expected = plain_logits(plain, inputs[TOKEN_IDS])
        assert torch.equal(run_stages(stages, tensors_of(plain), inputs), expected)
    assert set(stages[1].received) & set(stages[2].received)  # computed by the first, passed on by the second


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_together_hold_every_parameter(family: str) -> None:
    model = traced(family)[0].model
    named = all_tensors(model)
    stages = staged(family, 4).stages
    held = [{id(named[name]) for name in stage.tensors.values()} for stage in stages]
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    assert parameters.keys() <= set.union(*held)
    shared = {parameters[key] for a, b in combinations(held, 2) for key in a & b & parameters.keys()}
    assert shared == ({tied_name(family)} if family in TIED else set())


def tied_name(family: str) -> str:
    model = traced(family)[0].model
    return next(name for name, tensor in model.named_parameters() if tensor is model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_holds_the_layers_between_its_borders_and_its_plan_says_so(family: str) -> None:
    parts = staged(family, 2, (3,))
    layers, _ = find_layers(parts.sharded.model, NUM_LAYERS)
    for stage, numbers in zip(parts.stages, ({0, 1, 2}, {3}), strict=True):
        names = {name for name in stage.tensors.values() if name in traced(family)[1].parameters}
        inside = {int(name.removeprefix(f"{layers}.").split(".")[0]) for name in names if name.startswith(layers)}
        assert inside == numbers
        entries = parts.plan_of([stage]).parameters.values()
        planned = {alias for entry in entries for alias in (entry.name, *entry.aliases)}
        assert names <= planned and len(entries) == len({id(all_tensors(parts.sharded.model)[name]) for name in names})
        assert len(stage.sites) == len(numbers)
    assert {site.module_name for stage in parts.stages for site in stage.sites} == {
        site.module_name for site in parts.sharded.sites
    }


@pytest.mark.parametrize("family", TIED)
def test_tied_weight_is_on_the_first_and_the_last_stage(family: str) -> None:
    named = all_tensors(traced(family)[0].model)
    holders = [
        any(named[name] is named[tied_name(family)] for name in stage.tensors.values())
        for stage in staged(family, 4).stages
    ]
    assert holders == [True, False, False, True]


def test_every_stage_reads_the_positions_and_only_the_last_one_the_wanted_rows() -> None:
    """LLaMA's rotary embedding is computed again by each stage."""
    inputs = [set(stage.inputs.values()) for stage in staged("llama", 3).stages]
    assert ["positions" in names for names in inputs] == [True, True, True]
    assert ["rows" in names for names in inputs] == [False, False, True]


def test_rank_has_its_stages_sites_and_plan() -> None:
    place = PipelinePlace(rank=1, num_ranks=2, virtual_stages=2)
    whole = cut_into_stages(*traced("llama")[:2], place, traced("llama")[2])
    part = program_of(whole, place, {})
    expected = [write_stage(stage) for stage in (whole.stages[1], whole.stages[3])]
    assert [stage.source for stage in part.stages] == [stage.source for stage in expected]
    assert part.inputs_by_stage[1::2] == tuple(stage.inputs for stage in part.stages)
    assert [[site.module_name for site in sites] for sites in part.sites_of_ranks] == [
        [f"model.layers.{layer}.self_attn" for layer in layers] for layers in ((0, 2), (1, 3))
    ]
    assert "lm_head.weight" in part.plan.parameters and "model.embed_tokens.weight" not in part.plan.parameters
    assert part.whole_plan.parameters.keys() == traced("llama")[0].plan.parameters.keys()


def test_costs_are_the_bytes_of_this_ranks_shards() -> None:
    for group in (ALONE, TracedGroup(1, 2)):
        sharded = shard_causal_lm(FAMILIES["llama"](), torch.bfloat16, group)
        costs = cut_causal_lm(sharded, PipelinePlace()).costs
        embedding, head = sharded.model.model.embed_tokens.weight.nbytes, sharded.model.lm_head.weight.nbytes
        norm = sharded.model.model.norm.weight.nbytes
        layers = [sum(p.nbytes for p in layer.parameters()) for layer in sharded.model.model.layers]
        assert costs.num_bytes == (embedding, *layers, norm + head)
        assert costs.bytes_read == (0, *layers, norm + head)
        assert sum(costs.num_bytes) == sharded.plan.local_bytes(group.rank)


def test_tied_embedding_counts_where_it_is_held_and_where_it_is_read() -> None:
    parts = staged("gpt2", 1)
    embedding = parts.sharded.model.transformer.wte.weight.nbytes
    positions = parts.sharded.model.transformer.wpe.weight.nbytes
    assert parts.costs.num_bytes[0] == embedding + positions and parts.costs.bytes_read[0] == 0
    assert parts.costs.num_bytes[-1] == parts.costs.bytes_read[-1] == embedding + 2 * 64 * 4


def test_large_vocabulary_makes_the_outer_stages_shorter() -> None:
    """What a step reads of the embedding is nothing, so the stage of the head is the shorter one of the two."""
    sharded = shard_causal_lm(FAMILIES["llama"](num_hidden_layers=9, vocab_size=1000), torch.float32, ALONE)
    borders = cut_causal_lm(sharded, PipelinePlace(0, 3)).borders
    first, middle, last = (after - before for before, after in pairwise((0, *borders, 9)))
    assert middle > first > last


COSTS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=3, max_size=10)


@given(COSTS, st.integers(1, 5))
def test_borders_make_the_heaviest_stage_as_light_as_can_be(parts: list[tuple[int, int]], num_stages: int) -> None:
    costs = LayerCosts(tuple(held for held, _ in parts), tuple(read for _, read in parts))
    num_layers = len(parts) - 2
    if num_stages > num_layers:
        with pytest.raises(PlanError, match=f"cannot be cut into {num_stages} stages"):
            choose_borders(costs, num_stages)
        return
    weights = shares(costs)
    layers = weights[1:-1]
    layers[0] += weights[0]
    layers[-1] += weights[-1]

    def heaviest(borders: tuple[int, ...]) -> float:
        return max(sum(layers[begin:end]) for begin, end in pairwise((0, *borders, num_layers)))

    borders = choose_borders(costs, num_stages)
    assert check_borders(borders, num_layers, num_stages) == borders
    best = min(map(heaviest, combinations(range(1, num_layers), num_stages - 1)))
    assert heaviest(borders) <= best + 1e-9


def test_weight_is_half_the_bytes_held_and_half_the_bytes_read() -> None:
    assert shares(LayerCosts((4, 2, 2), (0, 3, 1))) == [0.25, 0.5, 0.25]
    assert shares(LayerCosts((0, 0, 0), (0, 0, 0))) == [0, 0, 0]


def test_users_split_points_are_kept() -> None:
    assert staged("llama", 3, (1, 3)).borders == (1, 3)
    assert [len(stage.sites) for stage in staged("llama", 3, (1, 3)).stages] == [1, 2, 1]


@pytest.mark.parametrize(
    ("split_points", "num_stages", "message"),
    [
        ((1,), 3, "split_points has 1 entries, 3 stages need 2"),
        ((), 2, "split_points has 0 entries, 2 stages need 1"),
        ((3, 1), 3, r"split_points \[3, 1\] must rise from 1 to at most 3, as the model has 4 layers"),
        ((2, 2), 3, r"split_points \[2, 2\] must rise"),
        ((0,), 2, r"split_points \[0\] must rise"),
        ((4,), 2, r"split_points \[4\] must rise"),
        ((-1,), 2, r"split_points \[-1\] must rise"),
    ],
)
def test_split_points_that_do_not_fit_are_refused(split_points: tuple[int, ...], num_stages: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        staged("llama", num_stages, split_points)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(PlanError, match="4 layers cannot be cut into 5 stages: lower pipeline_parallel_size"):
        staged("llama", 5)


def test_stage_that_would_need_a_later_ones_work_is_refused() -> None:
    """As if a model ran its layers in another order than it lists them."""
    _, graph, sites = traced("llama")
    places = Places(graph, "model.layers", NUM_LAYERS)
    places._of = {
        node: NUM_LAYERS - 1 - place if place in range(NUM_LAYERS) else place for node, place in places._of.items()
    }
    with pytest.raises(PlanError, match=r"stage \d needs '.*', which a later stage computes: choose other borders"):
        cut(places, (2,), sites)


def test_layers_are_found_by_their_number() -> None:
    expected = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}
    for family, name in expected.items():
        assert find_layers(traced(family)[0].model, NUM_LAYERS) == (name, NUM_LAYERS)
    assert find_layers(traced("llama")[0].model, 5) == ("", 1)


def test_model_that_names_no_number_of_layers_counts_as_one() -> None:
    model: Any = torch.nn.Sequential(torch.nn.ModuleList(), torch.nn.ModuleList([torch.nn.Linear(1, 1)]))
    assert find_layers(model, 0) == ("", 1)
