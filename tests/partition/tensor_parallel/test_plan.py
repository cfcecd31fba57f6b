"""What each rank keeps of each parameter: everything is kept by somebody, and cut where its heads and pairs allow."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, TINY_FAMILIES
from transformers import CONFIG_MAPPING, PreTrainedModel

from ts_parallel.checkpoint.stored import Slice
from ts_parallel.errors import PlanError
from ts_parallel.partition.model.attention_sites import AttentionSite, find_attention_sites
from ts_parallel.partition.model.deferred import build_deferred
from ts_parallel.partition.tensor_parallel.plan import ParameterPlan, TensorParallelPlan, plan_tensor_parallel

KEY_VALUE_NAMES = ("k_proj", "v_proj", "qkv_proj")


@cache
def model_of(family: str, **changes: Any) -> PreTrainedModel:
    """Planning touches nothing of a model, so tests share it."""
    return build_deferred(FAMILIES[family](**changes), torch.bfloat16)


@cache
def sites_of(model: PreTrainedModel) -> tuple[AttentionSite, ...]:
    return find_attention_sites(model)


@cache
def make_plan(model: PreTrainedModel, size: int) -> TensorParallelPlan:
    return plan_tensor_parallel(model, sites_of(model), size)


def plan_of(family: str, size: int, **changes: Any) -> TensorParallelPlan:
    return make_plan(model_of(family, **changes), size)


def slices_of(entry: ParameterPlan) -> tuple[Slice, ...]:
    assert entry.slices is not None, f"{entry.name} is replicated"
    return entry.slices


def kept_positions(kept: Slice) -> list[int]:
    return [position for start, length in kept.pieces for position in range(start, start + length)]


def name_of(model: PreTrainedModel, wanted: torch.nn.Module) -> str:
    names: dict[torch.nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[wanted]


def entry_of(plan: TensorParallelPlan, name: str) -> ParameterPlan:
    """The entry under any of a tied parameter's names."""
    return next(entry for entry in plan.parameters.values() if name in (entry.name, *entry.aliases))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_all_ranks_cover_every_tensor_exactly(family: str, size: int) -> None:
    plan = plan_of(family, size)
    num_kv_heads = min((site.num_kv_heads for site in plan.attention.values()), default=size)
    for entry in plan.parameters.values():
        if entry.slices is None:
            continue
        assert len(entry.slices) == size
        counts = Counter(position for kept in entry.slices for position in kept_positions(kept))
        assert sorted(counts) == list(range(entry.shape[entry.slices[0].dim])), entry.name
        is_repeated = num_kv_heads < size and any(name in entry.name for name in KEY_VALUE_NAMES)
        assert max(counts.values()) == (size // num_kv_heads if is_repeated else 1), entry.name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_the_model_is_planned_once_with_its_shape(family: str) -> None:
    model = model_of(family)
    plan = make_plan(model, 2)
    names = [name for entry in plan.parameters.values() for name in (entry.name, *entry.aliases)]
    assert sorted(names) == sorted(model.state_dict())
    for name, parameter in model.named_parameters():
        assert plan.parameters[name].shape == tuple(parameter.shape)
        assert plan.parameters[name].dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_every_layer_is_split(family: str) -> None:
    """Whole matrices would be right as well, and cost each rank the memory that it was to save."""
    for entry in plan_of(family, 2).parameters.values():
        is_in_layer = ".layers." in entry.name or ".h." in entry.name
        if (
            is_in_layer and len(entry.shape) > 1 and not entry.name.endswith("mlp.gate.weight")
        ):  # a router decides whole
            assert entry.slices is not None, entry.name


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_head_keep_rows_of_the_vocabulary(family: str, size: int) -> None:
    model = model_of(family)
    plan = make_plan(model, size)
    for module, style in ((model.get_input_embeddings(), "embedding"), (model.get_output_embeddings(), "head")):
        name = name_of(model, module)
        assert plan.styles[name] == style
        entry = entry_of(plan, f"{name}.weight")
        assert {kept.dim for kept in slices_of(entry)} == {0}
        assert sum(kept.length for kept in slices_of(entry)) == model.config.vocab_size


def test_uneven_vocabulary_leaves_the_last_rank_less() -> None:
    entry = plan_of("llama", 2, vocab_size=97).parameters["lm_head.weight"]
    assert [kept.pieces for kept in slices_of(entry)] == [((0, 49),), ((49, 48),)]
    assert [entry.local_shape(rank) for rank in range(2)] == [(49, 64), (48, 64)]
    assert entry.describe() == "dim 0 in 49+48"
    assert [kept.length for kept in slices_of(plan_of("llama", 4).parameters["lm_head.weight"])] == [25, 25, 25, 22]


def test_bias_of_a_head_is_cut_like_its_weight() -> None:
    config = CONFIG_MAPPING["phi"](hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=97)
    plan = make_plan(build_deferred(config, torch.bfloat16), 2)
    assert plan.parameters["lm_head.bias"].slices == plan.parameters["lm_head.weight"].slices
    assert slices_of(plan.parameters["lm_head.bias"])[1] == Slice(0, ((49, 48),))


def test_llama_opens_each_pair_by_columns_and_closes_it_by_rows() -> None:
    plan = plan_of("llama", 2)
    expected = {
        "self_attn.q_proj": (0, [(0, 32), (32, 32)]),
        "self_attn.k_proj": (0, [(0, 16), (16, 16)]),
        "self_attn.v_proj": (0, [(0, 16), (16, 16)]),
        "self_attn.o_proj": (1, [(0, 32), (32, 32)]),
        "mlp.gate_proj": (0, [(0, 64), (64, 64)]),
        "mlp.up_proj": (0, [(0, 64), (64, 64)]),
        "mlp.down_proj": (1, [(0, 64), (64, 64)]),
    }
    for layer in range(4):
        for name, (dim, pieces) in expected.items():
            entry = plan.parameters[f"model.layers.{layer}.{name}.weight"]
            assert entry.slices == tuple(Slice(dim, (piece,)) for piece in pieces)
            assert plan.styles[f"model.layers.{layer}.{name}"] == ("colwise" if dim == 0 else "rowwise")
        assert plan.parameters[f"model.layers.{layer}.input_layernorm.weight"].slices is None
    assert plan.parameters["model.norm.weight"].describe() == "replicated"


def test_fewer_key_value_heads_than_ranks_are_kept_by_neighbours() -> None:
    plan = plan_of("llama", 4)
    attention = "model.layers.0.self_attn"
    heads = [((0, 16),), ((0, 16),), ((16, 16),), ((16, 16),)]
    assert [kept.pieces for kept in slices_of(plan.parameters[f"{attention}.k_proj.weight"])] == heads
    assert [kept.pieces for kept in slices_of(plan.parameters[f"{attention}.v_proj.weight"])] == heads
    assert [kept.pieces for kept in slices_of(plan.parameters[f"{attention}.q_proj.weight"])] == [
        ((0, 16),),
        ((16, 16),),
        ((32, 16),),
        ((48, 16),),
    ]


def test_fused_projection_of_phi3_is_cut_in_three_pieces_and_its_gate_in_two() -> None:
    plan = plan_of("phi3", 2)
    qkv = plan.parameters["model.layers.0.self_attn.qkv_proj.weight"]  # 64 query, 32 key, 32 value features
    assert qkv.slices == (Slice(0, ((0, 32), (64, 16), (96, 16))), Slice(0, ((32, 32), (80, 16), (112, 16))))
    gate_up = plan.parameters["model.layers.0.mlp.gate_up_proj.weight"]  # 128 gate, 128 up features
    assert gate_up.slices == (Slice(0, ((0, 64), (128, 64))), Slice(0, ((64, 64), (192, 64))))
    assert gate_up.describe() == "dim 0 in 128+128, 2 pieces"


def test_fused_projection_of_phi3_repeats_its_few_key_value_heads() -> None:
    qkv = plan_of("phi3", 4).parameters["model.layers.0.self_attn.qkv_proj.weight"]
    assert [kept.pieces for kept in slices_of(qkv)] == [
        ((0, 16), (64, 16), (96, 16)),
        ((16, 16), (64, 16), (96, 16)),
        ((32, 16), (80, 16), (112, 16)),
        ((48, 16), (80, 16), (112, 16)),
    ]


def test_fused_projection_of_gpt2_is_cut_in_three_pieces_of_the_second_dim() -> None:
    """Conv1D keeps its weight as `[input, output]`."""
    plan = plan_of("gpt2", 2)
    pieces = [((0, 32), (64, 32), (128, 32)), ((32, 32), (96, 32), (160, 32))]
    attention = "transformer.h.0.attn"
    assert plan.parameters[f"{attention}.c_attn.weight"].slices == tuple(Slice(1, piece) for piece in pieces)
    assert plan.parameters[f"{attention}.c_attn.bias"].slices == tuple(Slice(0, piece) for piece in pieces)
    assert plan.parameters[f"{attention}.c_proj.weight"].slices == (Slice(0, ((0, 32),)), Slice(0, ((32, 32),)))
    assert plan.parameters[f"{attention}.c_proj.bias"].slices is None


def test_fused_projection_of_gpt_neox_is_cut_between_heads() -> None:
    """Each head has its own query, key and value side by side: 4 heads of 3 × 16 features."""
    plan = plan_of("gpt_neox", 2)
    for name in ("weight", "bias"):
        entry = plan.parameters[f"gpt_neox.layers.0.attention.query_key_value.{name}"]
        assert entry.slices == (Slice(0, ((0, 96),)), Slice(0, ((96, 96),)))


def test_experts_are_cut_inside_each_expert_and_their_router_is_whole() -> None:
    plan = plan_of("mixtral", 2)
    experts = "model.layers.0.mlp.experts"  # gate_up_proj [4, 2 × 128, 64], down_proj [4, 64, 128]
    assert plan.styles[experts] == "experts"
    assert slices_of(plan.parameters[f"{experts}.gate_up_proj"])[1] == Slice(1, ((64, 64), (192, 64)))
    assert slices_of(plan.parameters[f"{experts}.down_proj"])[1] == Slice(2, ((64, 64),))
    assert plan.parameters["model.layers.0.mlp.gate.weight"].slices is None


def test_experts_are_kept_whole_where_that_is_asked_for() -> None:
    """Attention and all else are cut as before."""
    model = model_of("mixtral", num_local_experts=5)
    plan = plan_tensor_parallel(model, sites_of(model), 2, expert_parallel=True)
    experts, own = "model.layers.0.mlp.experts", (Slice(0, ((0, 3),)), Slice(0, ((3, 2),)))
    assert plan.styles[experts] == "whole_experts"
    assert plan.parameters[f"{experts}.gate_up_proj"].slices == own
    assert plan.parameters[f"{experts}.down_proj"].slices == own
    inside = make_plan(model, 2)
    for name, entry in plan.parameters.items():
        assert ".experts." in name or entry == inside.parameters[name]
    assert plan_tensor_parallel(model, sites_of(model), 1, expert_parallel=True) == make_plan(model, 1)


def test_bias_of_an_expert_goes_with_it() -> None:
    """GPT-OSS's own plan has no line for its experts, which are on every rank without expert parallelism."""
    config = TINY_FAMILIES["gpt_oss"]()
    model = build_deferred(config, torch.bfloat16)
    plan = plan_tensor_parallel(model, sites_of(model), 4, expert_parallel=True)
    own = tuple(Slice(0, ((expert, 1),)) for expert in range(4))
    for leaf in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
        assert plan.parameters[f"model.layers.1.mlp.experts.{leaf}"].slices == own


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("mixtral", r"num_experts 4, of which tensor_parallel_size 8 ranks .*: set tensor_parallel_size to at most 4"),
        ("llama", "enable_expert_parallel: model type 'llama' has no experts"),
    ],
)
def test_experts_that_cannot_be_kept_whole_are_refused(family: str, says: str) -> None:
    model = model_of(family, num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(PlanError, match=says):
        plan_tensor_parallel(model, sites_of(model), 8, expert_parallel=True)


@pytest.mark.parametrize(
    ("family", "layer", "expected"),
    [
        (
            "gpt2",
            "transformer.h.0.",
            {"attn.c_attn": "colwise", "attn.c_proj": "rowwise", "mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"},
        ),
        (
            "opt",
            "model.decoder.layers.0.",
            {
                "self_attn.q_proj": "colwise",
                "self_attn.k_proj": "colwise",
                "self_attn.v_proj": "colwise",
                "self_attn.out_proj": "rowwise",
                "fc1": "colwise",
                "fc2": "rowwise",
            },
        ),
    ],
)
def test_family_without_a_plan_gets_one_from_its_structure(family: str, layer: str, expected: dict[str, str]) -> None:
    model = model_of(family)
    assert not [pattern for pattern in model.tp_plan or {} if "lm_head" not in pattern]
    styles = make_plan(model, 2).styles
    assert {name: style for name, style in styles.items() if name.startswith(layer)} == {
        layer + name: style for name, style in expected.items()
    }


def test_projections_around_the_layers_are_no_pair() -> None:
    """OPT-350m narrows its embedding; its two projections are registered in the order of a pair, and are none."""
    styles = plan_of("opt", 2, word_embed_proj_dim=32, do_layer_norm_before=False).styles
    assert not {"model.decoder.project_in", "model.decoder.project_out"} & styles.keys()


def test_norm_over_all_heads_keeps_the_heads_together() -> None:
    """OLMo 2 normalises queries and keys over all heads, so its projections are gathered before and cut after."""
    plan = plan_of("olmo2", 2)
    assert plan.styles["model.layers.0.self_attn.q_proj"] == "colwise_gather_output"
    assert plan.styles["model.layers.0.self_attn.o_proj"] == "rowwise_split_input"
    assert plan.attention == {}
    assert plan_of("llama", 2).attention.keys() == {f"model.layers.{layer}.self_attn" for layer in range(4)}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_keeps_everything_as_it_is(family: str) -> None:
    plan = plan_of(family, 1)
    assert plan.styles == {} and plan.attention == {}
    assert {entry.slices for entry in plan.parameters.values()} == {None}


def heads(num_heads: int, num_kv_heads: int, size: int) -> list[tuple[list[int], list[int]]]:
    site = AttentionSite("attention", num_heads, num_kv_heads, 8, 8, None, 1.0, None, False)
    return [(list(site.heads_of(rank, size)), list(site.kv_heads_of(rank, size))) for rank in range(size)]


def test_heads_are_cut_between_those_that_read_the_same_key_value_head() -> None:
    assert heads(9, 3, 2) == [([0, 1, 2, 3, 4, 5], [0, 1]), ([6, 7, 8], [2])]
    assert heads(14, 2, 4) == [([0, 1, 2, 3], [0]), ([4, 5, 6], [0]), ([7, 8, 9, 10], [1]), ([11, 12, 13], [1])]
    assert heads(4, 4, 3) == [([0, 1], [0, 1]), ([2], [2]), ([3], [3])]
    assert heads(6, 3, 4) == [([0], [0]), ([1], [0]), ([2, 3], [1]), ([4, 5], [2])]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (4, 1), (6, 3), (9, 3), (14, 2), (12, 4)])
def test_every_rank_has_the_key_value_heads_that_its_query_heads_read(num_heads: int, num_kv_heads: int) -> None:
    for size in range(1, num_heads + 1):
        every = heads(num_heads, num_kv_heads, size)
        assert [head for own, _ in every for head in own] == list(range(num_heads))
        assert {head for _, own in every for head in own} == set(range(num_kv_heads))
        for own, kv_heads in every:
            assert own and len(own) % len(kv_heads) == 0
            group = len(own) // len(kv_heads)  # as many query heads for each, as the model's code and kernels count
            assert [kv_heads[place // group] for place in range(len(own))] == [
                head * num_kv_heads // num_heads for head in own
            ]


def test_heads_that_do_not_divide_are_cut_alike_in_all_linears_of_an_attention_module() -> None:
    plan = plan_of("llama", 2, hidden_size=72, head_dim=8, num_attention_heads=9, num_key_value_heads=3)
    own = {name: plan.parameters[f"model.layers.0.self_attn.{name}_proj.weight"].slices for name in "qkvo"}
    kv_heads = (Slice(0, ((0, 16),)), Slice(0, ((16, 8),)))
    assert own["k"] == own["v"] == kv_heads
    assert own["q"] == (Slice(0, ((0, 48),)), Slice(0, ((48, 24),)))
    assert own["o"] == (Slice(1, ((0, 48),)), Slice(1, ((48, 24),)))


def test_fused_projections_are_cut_between_heads_that_do_not_divide() -> None:
    qkv = plan_of("phi3", 3).parameters["model.layers.0.self_attn.qkv_proj.weight"]  # 4 heads, 2 key/value heads
    pieces = [((0, 16), (64, 16), (96, 16)), ((16, 16), (64, 16), (96, 16)), ((32, 32), (80, 16), (112, 16))]
    assert [kept.pieces for kept in slices_of(qkv)] == pieces
    c_attn = plan_of("gpt2", 3).parameters["transformer.h.0.attn.c_attn.weight"]
    pieces = [((0, 32), (64, 32), (128, 32)), ((32, 16), (96, 16), (160, 16)), ((48, 16), (112, 16), (176, 16))]
    assert [kept.pieces for kept in slices_of(c_attn)] == pieces


def test_features_that_do_not_divide_are_cut_where_kernels_want_it() -> None:
    def parts(width: int, size: int) -> list[int]:
        entry = plan_of("llama", size, intermediate_size=width).parameters["model.layers.0.mlp.up_proj.weight"]
        return [kept.length for kept in slices_of(entry)]

    assert parts(4864, 3) == [1664, 1600, 1600]  # in panels of 64
    assert parts(8960, 3) == [3008, 3008, 2944]
    assert parts(1000, 3) == [336, 336, 328]
    assert parts(129, 2) == [64, 65]
    assert parts(5, 4) == [2, 1, 1, 1]


def test_more_ranks_than_heads_are_refused_with_the_sizes_that_work() -> None:
    message = (
        r"'model\.layers\.0\.self_attn\.q_proj\.weight' has 4 query heads and 2 key/value heads, which 5 ranks cannot "
        r"share: tensor_parallel_size must be one of \[1, 2, 3, 4\]"
    )
    with pytest.raises(PlanError, match=message):
        plan_of("llama", 5)


def test_vocabulary_leaves_no_rank_without_rows() -> None:
    entry = plan_of("llama", 4, vocab_size=5).parameters["model.embed_tokens.weight"]
    assert [kept.length for kept in slices_of(entry)] == [2, 1, 1, 1]
    message = r"dim 0 of 'model\.embed_tokens\.weight' has 3 rows, which 4 ranks cannot share: .* at most 3"
    with pytest.raises(PlanError, match=message):
        plan_of("llama", 4, vocab_size=3)


def test_style_that_is_not_known_is_refused_by_name() -> None:
    model = build_deferred(FAMILIES["llama"](), torch.bfloat16)
    model.tp_plan = {**model.tp_plan, "model.layers.*.mlp.up_proj": "sequence_parallel"}
    with pytest.raises(PlanError, match=r"'sequence_parallel' of 'model\.layers\.0\.mlp\.up_proj' \(Linear\)"):
        make_plan(model, 2)


def test_better_plan_of_ours_that_matches_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ts_parallel.partition.tensor_parallel.plan._BETTER_STYLES",
        {"phi3": {"layers.*.self_attn.qkv_project": "colwise"}},
    )
    message = (
        r"'model\.layers\.\*\.self_attn\.qkv_project' matches no module; .* 'model\.layers\.\*\.self_attn\.qkv_proj'"
    )
    with pytest.raises(PlanError, match=message):
        plan_tensor_parallel(model_of("phi3"), sites_of(model_of("phi3")), 2)


def test_shipped_plan_may_speak_of_parts_that_the_model_lacks() -> None:
    model = build_deferred(FAMILIES["llama"](), torch.bfloat16)
    model.tp_plan = {**model.tp_plan, "model.layers.*.self_attn.zork": "colwise"}
    assert make_plan(model, 2).styles == plan_of("llama", 2).styles


def test_local_bytes_are_those_of_the_rows_that_are_kept() -> None:
    plan = plan_of("llama", 2)
    attention = 32 * 64 + 2 * 16 * 64 + 64 * 32
    mlp = 3 * 64 * 64
    norms = 2 * 64
    rest = 4 * (attention + mlp + norms) + 64
    assert plan.local_bytes(0) == 2 * (2 * 49 * 64 + rest)
    assert plan.local_bytes(1) == 2 * (2 * 48 * 64 + rest)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_all_ranks_sum_to_the_models_own(family: str) -> None:
    model = model_of(family)
    plan = make_plan(model, 2)
    whole = sum(parameter.numel() * 2 for parameter in model.parameters())
    replicated = sum(entry.local_bytes(0) for entry in plan.parameters.values() if entry.slices is None)
    assert sum(plan.local_bytes(rank) for rank in range(2)) == whole + replicated
    assert make_plan(model, 1).local_bytes(0) == whole
