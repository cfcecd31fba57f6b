"""A trace is the model's own code with open sizes: nothing is allocated, nothing is left behind, nothing is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from families import FAMILIES
from transformers import CONFIG_MAPPING, PreTrainedModel
from whole_model import ALONE, plain_logits, plain_model, run_stages, sequence, stage_model, tensors_of

from ts_parallel.errors import PlanError
from ts_parallel.partition.build import ShardedModel, all_tensors, cut_into_stages, shard_causal_lm
from ts_parallel.partition.graph import trace as trace_room
from ts_parallel.partition.graph.functional import is_mutable
from ts_parallel.partition.graph.trace import TracedGroup, TracedModel, all_gather_marker, all_reduce_marker
from ts_parallel.partition.model.causal_lm import trace_causal_lm
from ts_parallel.partition.model.deferred import build_deferred
from ts_parallel.partition.program import ROWS, TOKEN_IDS, PipelinePlace
from ts_parallel.partition.tensor_parallel.plan import plan_tensor_parallel
from ts_parallel.topology import TensorParallelGroup

IN_PLACE = {
    "deepseek_v2": {
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "granitemoe": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def small(model_type: str, **settings: Any) -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return CONFIG_MAPPING[model_type](**{**sizes, "vocab_size": 97, "pad_token_id": None, **settings})


def trace(model: PreTrainedModel) -> TracedModel:
    traced, _ = trace_causal_lm(model, model.config.num_hidden_layers)
    return traced


def counted(traced: TracedModel, *targets: object) -> int:
    return sum(node.target in targets for node in traced.graph.nodes)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "mixtral"])
def test_sizes_that_a_step_brings_stay_open(family: str) -> None:
    config = FAMILIES[family](num_hidden_layers=2)
    plain, staged = plain_model(config), stage_model(FAMILIES[family](num_hidden_layers=2), num_stages=2)
    for length in (1, 2, 3, 7, 40):
        inputs = sequence(length, config.vocab_size, seed=length)
        whole = plain_logits(plain, inputs[TOKEN_IDS])
        for rows in ([], [length - 1], [0], list(range(length)), [length - 1, 0, 0]):
            wanted = torch.tensor(rows, dtype=torch.int64)
            logits = run_stages(staged.stages, tensors_of(plain), {**inputs, ROWS: wanted})
            assert logits.shape == (1, len(rows), config.vocab_size)
            torch.testing.assert_close(logits, whole[:, wanted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weights_are_without_memory_before_and_after(family: str) -> None:
    model = build_deferred(FAMILIES[family](), torch.bfloat16)
    before = all_tensors(model)
    buffers = {id(module): dict(module._buffers) for module in model.modules()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    trace(model)
    after = all_tensors(model)
    assert list(after) == list(before)
    assert all(tensor is before[name] and tensor.is_meta for name, tensor in after.items())
    assert {id(module): dict(module._buffers) for module in model.modules()} == buffers
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "starcoder2"])
def test_tied_weights_are_one_before_and_after_and_in_the_graph(family: str) -> None:
    model = build_deferred(FAMILIES[family](), torch.float32)
    traced = trace(model)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    tied = {name for name, tensor in all_tensors(model).items() if tensor is model.get_input_embeddings().weight}
    assert len(tied) == 2
    (placeholder,) = (node for node, name in traced.tensors.items() if name in tied and node.users)
    users = {node.target for node in placeholder.users}
    assert users == {torch.ops.aten.embedding.default, torch.ops.aten.linear.default}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_every_parameter_is_in_the_graph_under_its_own_names(family: str) -> None:
    model = build_deferred(FAMILIES[family](), torch.float32)
    assert trace(model).parameters == {name for name, _ in model.named_parameters(remove_duplicate=False)}


def llama_that(change: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    """Its last norm does `change` first, in code that is not transformers'."""
    model = build_deferred(FAMILIES["llama"](num_hidden_layers=1), torch.float32)
    norm = model.model.norm.forward
    model.model.norm.forward = lambda hidden: norm(change(hidden))
    return model


def check_change(change: Callable[[torch.Tensor], torch.Tensor]) -> TracedModel:
    """The trace of such a model, which computes what the plain one with the same change does."""
    plain = plain_model(FAMILIES["llama"](num_hidden_layers=1))
    norm, inputs = plain.model.norm.forward, sequence(5)
    plain.model.norm.forward = lambda hidden: norm(change(hidden))
    sharded = ShardedModel(model := llama_that(change), plan_tensor_parallel(model, (), 1), ())
    traced, sites = trace_causal_lm(model, 1)
    stages = cut_into_stages(sharded, traced, PipelinePlace(), sites).stages
    expected = plain_logits(plain, inputs[TOKEN_IDS])
    assert torch.equal(run_stages(stages, tensors_of(plain), inputs), expected)
    return traced


def test_branch_on_data_is_refused_with_its_module_and_line() -> None:
    model = llama_that(lambda hidden: hidden * 2 if hidden.abs().max() > 1 else hidden)
    before = all_tensors(model)
    message = (
        r"LlamaForCausalLM cannot be traced: model\.norm \(LlamaRMSNorm\) stops it at "
        r"`hidden_states = self\.norm\(hidden_states\)` \(modeling_llama\.py:\d+\): GuardOnDataDependentSymNode"
    )
    with pytest.raises(PlanError, match=message):
        trace(model)
    after = all_tensors(model)
    assert after.keys() == before.keys() and all(after[name] is tensor for name, tensor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_size_that_the_code_fixes_is_refused() -> None:
    """A trace that holds for 7 tokens alone would be wrong for all others, or fail there."""
    with pytest.raises(PlanError, match=r"LlamaForCausalLM cannot be traced: .*Constraint"):
        trace(llama_that(lambda hidden: hidden.reshape(1, 7, 64)))


def test_rotary_frequencies_that_depend_on_the_positions_are_refused_with_their_module() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = build_deferred(FAMILIES["llama"](rope_parameters=rope), torch.float32)
    with pytest.raises(PlanError, match=r"model\.rotary_emb \(LlamaRotaryEmbedding\) stops it at `.*` \(.*\.py:\d+\)"):
        trace(model)


@pytest.mark.parametrize("model_type", IN_PLACE)
def test_operations_in_place_are_done_all_the_same(model_type: str) -> None:
    """A cut goes by what is read from what, and would lose a write into a tensor."""
    plain = plain_model(small(model_type, **IN_PLACE[model_type]))
    staged = stage_model(small(model_type, **IN_PLACE[model_type]), num_stages=2)
    inputs = sequence(20)
    for node in (node for stage in staged.stages for node in stage.nodes):
        assert not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable, node
    expected = plain_logits(plain, inputs[TOKEN_IDS])
    assert torch.equal(run_stages(staged.stages, tensors_of(plain), inputs), expected)


def into_parts(hidden: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros_like(hidden)
    whole[..., 32:].copy_(hidden[..., :32])
    whole[..., :32] += hidden[..., 32:]
    return whole.mul_(3)


def read_before_and_after(hidden: torch.Tensor) -> torch.Tensor:
    scores = hidden.exp()
    total = scores.sum(-1, keepdim=True)
    scores.div_(total).add_(1)
    return scores * hidden + total


def seen_through_a_view(hidden: torch.Tensor) -> torch.Tensor:
    made = hidden * 2
    turned = made.transpose(1, 2)
    made.add_(hidden)
    return hidden + turned.transpose(1, 2)


def view_is_written(hidden: torch.Tensor) -> torch.Tensor:
    made = hidden * 2
    made.view(-1, 64)[:, 3].zero_()
    return made


def of_another_dtype(hidden: torch.Tensor) -> torch.Tensor:
    """Writing rounds to the dtype of what is written to; multiplying would give the larger one."""
    made = hidden.to(torch.bfloat16) * 2
    made.mul_(hidden.exp())
    return made.float() + hidden


def one_after_another(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.clone().relu_().sub_(hidden, alpha=2)


WRITES = [into_parts, read_before_and_after, seen_through_a_view, view_is_written, of_another_dtype]


@pytest.mark.parametrize("change", [*WRITES, one_after_another])
def test_in_place_operation_of_a_models_own_code_is_not_lost(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    traced = check_change(change)
    assert not any(map(is_mutable, traced.graph.nodes))


@pytest.mark.parametrize(
    ("change", "is_enough"), [(read_before_and_after, True), (one_after_another, True), (view_is_written, False)]
)
def test_writes_into_ones_own_memory_need_no_second_trace(
    change: Callable[[torch.Tensor], torch.Tensor], is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = []
    again = trace_room._functionalise
    monkeypatch.setattr(trace_room, "_functionalise", lambda program: second.append(program) or again(program))
    check_change(change)
    assert len(second) == (not is_enough)


class CountingGroup(TensorParallelGroup):
    """Counts its traffic by kind, without any."""

    counts: ClassVar[Counter[str]] = Counter()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.counts["all_reduce"] += 1
        return tensor

    def all_gather(self, tensor: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        self.counts["all_gather"] += 1
        return tensor.new_empty(*tensor.shape[:-1], sum(sizes))


@pytest.mark.parametrize(
    ("family", "all_reduces", "all_gathers"),
    [("llama", 2 * 4 + 1, 0), ("gpt2", 2 * 4 + 1, 0), ("opt", 2 * 4 + 1, 0), ("olmo2", 2 * 4 + 1, 3 * 4)],
)
def test_traffic_between_ranks_is_marked_as_often_as_it_is_done(
    family: str, all_reduces: int, all_gathers: int
) -> None:
    """Two sums a layer and one of the embedding; OLMo 2 gathers queries and keys for their norms, and values."""
    sharded = shard_causal_lm(FAMILIES[family](), torch.float32, TracedGroup(1, 2))
    traced = trace(sharded.model)
    assert counted(traced, all_reduce_marker._opoverload) == all_reduces
    assert counted(traced, all_gather_marker._opoverload) == all_gathers
    CountingGroup.counts.clear()
    eager = shard_causal_lm(FAMILIES[family](), torch.float32, CountingGroup(1, 2)).model
    CountingGroup.counts.clear()
    ids = torch.zeros(1, 5, dtype=torch.long, device="meta")
    eager(input_ids=ids, position_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert CountingGroup.counts == Counter(
        {"all_reduce": all_reduces} | ({"all_gather": all_gathers} if all_gathers else {})
    )


def test_one_rank_has_no_traffic() -> None:
    traced = trace(shard_causal_lm(FAMILIES["olmo2"](), torch.float32, ALONE).model)
    assert counted(traced, all_reduce_marker._opoverload, all_gather_marker._opoverload) == 0


def test_tensor_that_the_code_makes_itself_is_kept() -> None:
    scale = torch.arange(64.0)
    traced = check_change(lambda hidden: hidden * scale + torch.tensor([0.5]))
    assert [tuple(value.shape) for value in traced.constants.values()].count((64,)) == 1
