"""A plan applied: shapes, ties and head counts of each rank, and ranks that compute together what the plain model does.

The ranks here are threads of one process that talk over gloo, each with its own part of the model.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, save_random_model
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from ts_parallel.errors import PlanError
from ts_parallel.partition.build import build_eager_model, eager_program, shard_causal_lm
from ts_parallel.partition.load import RankModel
from ts_parallel.partition.model.attention_sites import AttentionPattern, attach, find_attention_sites
from ts_parallel.partition.model.deferred import build_deferred
from ts_parallel.partition.tensor_parallel.plan import plan_tensor_parallel
from ts_parallel.partition.tensor_parallel.shard import apply_tensor_parallel
from ts_parallel.topology import TensorParallelGroup

NUM_TOKENS = 24  # longer than any window


def small(family: str, **changes: Any) -> PretrainedConfig:
    return FAMILIES[family](num_hidden_layers=2, **changes)


def open_groups(size: int) -> list[TensorParallelGroup]:
    store = torch._C._distributed_c10d.HashStore()

    def join(rank: int) -> TensorParallelGroup:
        group: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        return TensorParallelGroup(rank, size, group)

    with ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(join, range(size)))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, KV, T, D]
    value: torch.Tensor,
    pattern: AttentionPattern,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # [1, T, H, D]
    """Attention of one sequence, written out."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    scores = query @ key.repeat_interleave(groups, dim=1).mT * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    is_seen = (distance >= 0) & (distance < (pattern.window or length))
    weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2)


@torch.inference_mode()
def logits_of(part: RankModel, token_ids: torch.Tensor) -> torch.Tensor:
    backend: Any = SimpleNamespace(attend=attend)
    assert part.model is not None
    attach(part.model, backend)
    positions = torch.arange(token_ids.shape[1]).unsqueeze(0)
    ones = torch.ones_like(token_ids)
    output = part.model(input_ids=token_ids, position_ids=positions, attention_mask=ones, use_cache=False)
    logits: torch.Tensor = output.logits[0]
    return logits


def assert_ranks_compute_what_the_plain_model_does(folder: Path, size: int, expert_parallel: bool = False) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    token_ids = torch.randint(plain.config.vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = plain(token_ids, use_cache=False).logits[0]
    parts = [
        build_eager_model(folder, "float32", group, torch.device("cpu"), expert_parallel=expert_parallel)
        for group in open_groups(size)
    ]
    with ThreadPoolExecutor(size) as ranks:
        shares = list(ranks.map(logits_of, parts, [token_ids] * size))
    assert expected.std() > 0.3  # or anything would be close to it
    torch.testing.assert_close(torch.cat(shares, dim=-1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_compute_what_the_plain_model_does(family: str, tmp_path: Path) -> None:
    save_random_model(tmp_path, small(family))
    assert_ranks_compute_what_the_plain_model_does(tmp_path, 2)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "olmo2", "mixtral"])
def test_four_ranks_compute_what_the_plain_model_does(family: str, tmp_path: Path) -> None:
    """More ranks than llama and phi3 have key/value heads."""
    save_random_model(tmp_path, small(family))
    assert_ranks_compute_what_the_plain_model_does(tmp_path, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_of_which_one_has_more_heads_compute_what_the_plain_model_does(family: str, tmp_path: Path) -> None:
    """Three of them share four heads, and two key/value heads where those are grouped."""
    save_random_model(tmp_path, small(family))
    assert_ranks_compute_what_the_plain_model_does(tmp_path, 3)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 1}),  # every rank keeps the one key/value head
        ("llama", {"intermediate_size": 129}),  # a pair whose halves differ
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"pad_token_id": 96}),  # a padding row that lies in the second rank's part alone
        ("gpt2", {"n_inner": 90}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("olmo2", {"vocab_size": 97}),
        ("stablelm", {"use_parallel_residual": True}),
        ("stablelm", {"qk_layernorm": True}),  # a norm for each head, in a list
        ("stablelm", {"qk_layernorm": True, "num_key_value_heads": 1}),
        ("stablelm", {"qk_layernorm": True, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
        ("gpt_neox", {"hidden_size": 80, "num_attention_heads": 5}),
        ("mixtral", {"num_local_experts": 12}),  # experts whose names do not sort as their numbers do
        ("mixtral", {"intermediate_size": 132}),  # halves that torch's grouped matrix product refuses
    ],
)
def test_unusual_shapes_are_right_too(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    save_random_model(tmp_path, small(family, **changes))
    assert_ranks_compute_what_the_plain_model_does(tmp_path, 2)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("phi", {}),  # its head has a bias
        ("gpt_bigcode", {"multi_query": True}),
        ("gpt_bigcode", {"multi_query": False}),  # its c_attn is cut between heads, GPT-2's is not
        ("cohere", {"use_qk_norm": True, "num_key_value_heads": 2, "logit_scale": 1.0}),  # a norm of [heads, head dim]
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_other_families_are_right_too(model_type: str, changes: dict[str, Any], size: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    save_random_model(tmp_path, CONFIG_MAPPING[model_type](**sizes, pad_token_id=0, **changes))
    assert_ranks_compute_what_the_plain_model_does(tmp_path, size)


def test_ranks_that_share_each_expert_compute_what_the_plain_model_does(tmp_path: Path) -> None:
    save_random_model(tmp_path, small("mixtral"))
    fused = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    save_file(fused, tmp_path / "model.safetensors")
    assert_ranks_compute_what_the_plain_model_does(tmp_path, 2)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"num_local_experts": 12}),
        (4, {"num_local_experts": 5}),  # most ranks have one
        (2, {"intermediate_size": 130}),  # rows that torch's grouped matrix product refuses, also of the whole
    ],
)
def test_ranks_that_keep_experts_whole_compute_what_the_plain_model_does(
    size: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    save_random_model(tmp_path, small("mixtral", **changes))
    assert_ranks_compute_what_the_plain_model_does(tmp_path, size, expert_parallel=True)


def test_stacked_experts_are_kept_whole_too(tmp_path: Path) -> None:
    save_random_model(tmp_path, small("mixtral"))
    fused = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    save_file(fused, tmp_path / "model.safetensors")
    assert_ranks_compute_what_the_plain_model_does(tmp_path, 2, expert_parallel=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_local_shapes_are_the_plans(family: str) -> None:
    config, size = small(family), 4
    whole = build_deferred(config, torch.bfloat16)
    plan = plan_tensor_parallel(whole, find_attention_sites(whole), size)
    for rank in range(size):
        model = build_deferred(config, torch.bfloat16)
        apply_tensor_parallel(model, plan, TensorParallelGroup(rank, size))
        tensors = model.state_dict()
        for entry in plan.parameters.values():
            for name in (entry.name, *entry.aliases):
                assert tuple(tensors[name].shape) == entry.local_shape(rank), name
        assert sum(parameter.nbytes for parameter in model.parameters()) == plan.local_bytes(rank)


def test_linear_for_each_head_without_a_plan_is_refused() -> None:
    """A gate that gives each head one number: every rank would take the first heads' numbers."""
    model = build_deferred(small("llama"), torch.float32)
    with torch.device("meta"):
        model.model.layers[1].self_attn.head_gate = torch.nn.Linear(64, 4, bias=False)
    message = r"'model\.layers\.1\.self_attn\.head_gate\.weight' of model type 'llama' has a row for each of 4 heads"
    with pytest.raises(PlanError, match=rf"{message} .*: tensor_parallel_size must be 1"):
        plan_tensor_parallel(model, find_attention_sites(model), 2)
    assert plan_tensor_parallel(model, find_attention_sites(model), 1).styles == {}


def test_modules_for_each_head_keep_their_names_and_show_the_ranks_own() -> None:
    """Two ranks, four query heads and two key/value heads."""
    attention = shard_causal_lm(
        small("stablelm", qk_layernorm=True), torch.float32, TensorParallelGroup(1, 2)
    ).model.model
    attention = attention.layers[0].self_attn
    for norms, own in ((attention.q_layernorm.norms, ["2", "3"]), (attention.k_layernorm.norms, ["1"])):
        whole = dict(norms.named_children())
        assert len(norms) == len(own)
        assert list(norms) == [norms[index] for index in range(len(own))] == [whole[name] for name in own]
    assert list(dict(attention.q_layernorm.norms.named_children())) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "starcoder2"])
def test_ties_are_kept(family: str) -> None:
    model = shard_causal_lm(FAMILIES[family](), torch.float32, TensorParallelGroup(1, 2)).model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("family", "size", "heads"),
    [("llama", 2, (2, 1)), ("llama", 4, (1, 1)), ("gpt2", 2, (2, 2)), ("opt", 4, (1, 1)), ("olmo2", 2, (4, 2))],
)
def test_sites_have_the_heads_of_their_rank(family: str, size: int, heads: tuple[int, int]) -> None:
    sharded = shard_causal_lm(FAMILIES[family](), torch.float32, TensorParallelGroup(0, size))
    (sites,) = eager_program(sharded).sites_of_ranks
    assert {(site.num_heads, site.num_kv_heads) for site in sites} == {heads}
    whole = {(site.num_heads, site.num_kv_heads) for site in sharded.sites}
    assert whole == {(4, 4 if family in ("gpt2", "opt") else 2)}


def test_attention_is_told_its_heads_and_the_model_keeps_its_config() -> None:
    model = shard_causal_lm(FAMILIES["llama"](), torch.float32, TensorParallelGroup(0, 4)).model
    attention = model.model.layers[0].self_attn
    assert (attention.config.num_attention_heads, attention.config.num_key_value_heads) == (1, 1)
    assert attention.num_key_value_groups == 1
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)


def test_attention_that_counts_in_attributes_of_its_own_is_told_too() -> None:
    model = shard_causal_lm(FAMILIES["opt"](), torch.float32, TensorParallelGroup(0, 2)).model
    attention = model.model.decoder.layers[0].self_attn
    assert (attention.num_heads, attention.embed_dim, attention.head_dim) == (2, 32, 16)


def test_linears_tell_the_features_that_they_have() -> None:
    layer = shard_causal_lm(FAMILIES["llama"](), torch.float32, TensorParallelGroup(0, 2)).model.model.layers[0]
    assert (layer.mlp.up_proj.in_features, layer.mlp.up_proj.out_features) == (64, 64)
    assert (layer.mlp.down_proj.in_features, layer.mlp.down_proj.out_features) == (64, 64)
    layer = shard_causal_lm(FAMILIES["gpt2"](), torch.float32, TensorParallelGroup(0, 2)).model.transformer.h[0]
    assert (layer.attn.c_attn.nx, layer.attn.c_attn.nf) == (64, 96)
