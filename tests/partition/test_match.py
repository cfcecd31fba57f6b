"""Which stored tensors make up which parameter, and that a rank reads its own bytes of them and no others."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_random_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.load import byte_ranges
from ts_parallel.errors import CheckpointError
from ts_parallel.partition.build import ShardedModel, build_eager_model, shard_causal_lm
from ts_parallel.partition.load import load_items
from ts_parallel.partition.match import match_checkpoint
from ts_parallel.partition.model.deferred import materialise
from ts_parallel.partition.model.model_config import read_model_config
from ts_parallel.partition.program import Source, Sources
from ts_parallel.topology import TensorParallelGroup

EXPERTS = "model.layers.0.mlp.experts"
STORED = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven experts, stored one by one as Mixtral's own are. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("mixtral")
    save_random_model(folder, FAMILIES["mixtral"](num_hidden_layers=1, num_local_experts=11))
    return folder


def deferred(folder: Path, rank: int = 0, size: int = 1, expert_parallel: bool = False) -> ShardedModel:
    return shard_causal_lm(read_model_config(folder), torch.float32, TensorParallelGroup(rank, size), expert_parallel)


def match(folder: Path) -> Sources:
    part = deferred(folder)
    return match_checkpoint(part.model, part.plan, read_index(folder))


def copy_of(original: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    (folder / "config.json").write_text((original / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_each_parameter_is_matched_with_the_file_that_holds_it(tmp_path: Path) -> None:
    save_random_model(tmp_path / "one", FAMILIES["llama"](num_hidden_layers=2))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    plain.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    index, sources = read_index(tmp_path / "many"), match(tmp_path / "many")
    assert sources == {name: (Source(index[name], (0,) * len(index[name].shape)),) for name in plain.state_dict()}
    assert len({source.stored.file for (source,) in sources.values()}) > 2


def test_experts_stored_one_by_one_have_their_places_in_the_stack(mixtral: Path) -> None:
    index, sources = read_index(mixtral), match(mixtral)
    gates = [Source(index[f"{STORED}.{expert}.w1.weight"], (expert, 0, 0)) for expert in range(11)]
    ups = [Source(index[f"{STORED}.{expert}.w3.weight"], (expert, 128, 0)) for expert in range(11)]
    assert sources[f"{EXPERTS}.gate_up_proj"] == (*gates, *ups)
    downs = [Source(index[f"{STORED}.{expert}.w2.weight"], (expert, 0, 0)) for expert in range(11)]
    assert sources[f"{EXPERTS}.down_proj"] == tuple(downs)
    assert ups[3].box == ((3, 1), (128, 128), (0, 64))


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_read_disjoint_bytes_of_the_experts_and_together_all(
    mixtral: Path, size: int, expert_parallel: bool
) -> None:
    read = []
    for rank in range(size):
        part = deferred(mixtral, rank, size, expert_parallel)
        sources = match_checkpoint(part.model, part.plan, read_index(mixtral))
        materialise(part.model, torch.device("cpu"))
        items = load_items(part.model.state_dict(keep_vars=True), part.plan, sources, rank)
        assert all(item.target.is_contiguous() for item in items)
        assert sum(item.target.nbytes for item in items) == part.plan.local_bytes(rank)
        own = [item for item in items if ".experts." in item.source.name]
        read += [found for item in own for found in byte_ranges(item.source, item.kept)]
    read.sort()
    assert all(start + length <= after for (start, length), (after, _) in pairwise(read))
    stored = [tensor for name, tensor in read_index(mixtral).items() if ".experts." in name]
    assert sum(length for _, length in read) == sum(tensor.num_bytes for tensor in stored)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_other_families_experts_are_those_that_transformers_stacks(family: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[family](
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
        intermediate_size=96, moe_intermediate_size=96, num_experts=4, num_experts_per_tok=2, pad_token_id=None,
    )  # fmt: skip
    save_random_model(tmp_path, config)
    assert any(".experts.3." in name for name in read_index(tmp_path))
    ours = build_eager_model(tmp_path, "float32", TensorParallelGroup(0, 1), torch.device("cpu")).tensors
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_weight_that_zero_3_did_not_gather_is_said_to_be_that(mixtral: Path, tmp_path: Path) -> None:
    tensors = load_file(mixtral / "model.safetensors")
    tensors["model.norm.weight"] = torch.empty(0)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' in .* is empty, as .* `zero_to_fp32\.py`"):
        match(copy_of(mixtral, tmp_path, tensors))


def test_missing_expert_is_refused_with_both_counts(mixtral: Path, tmp_path: Path) -> None:
    tensors = load_file(mixtral / "model.safetensors")
    del tensors[f"{STORED}.4.w3.weight"]
    message = r"experts\.gate_up_proj' is a stack of 11 tensors like '\.experts\.\*\.w3\.weight', the checkpoint has 10"
    with pytest.raises(CheckpointError, match=message):
        match(copy_of(mixtral, tmp_path, tensors))


@pytest.mark.parametrize("shape", [(128, 63), (127, 64), (128,), ()])
def test_expert_of_another_shape_is_refused_by_name(mixtral: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = load_file(mixtral / "model.safetensors")
    tensors[f"{STORED}.4.w1.weight"] = torch.zeros(shape)
    with pytest.raises(
        CheckpointError, match=r"experts\.4\.w1\.weight' has shape .* does not fit into .*gate_up_proj'"
    ):
        match(copy_of(mixtral, tmp_path, tensors))


def test_experts_that_are_all_too_short_are_refused_with_both_lengths(mixtral: Path, tmp_path: Path) -> None:
    tensors = load_file(mixtral / "model.safetensors")
    tensors |= {name: tensor[:100].clone() for name, tensor in tensors.items() if name.endswith("w1.weight")}
    with pytest.raises(CheckpointError, match=r"stored parts of .*gate_up_proj' have 228 rows .* not 256"):
        match(copy_of(mixtral, tmp_path, tensors))


@pytest.mark.parametrize(
    ("operations", "named"),
    [
        ([Transpose(0, 1)], "Transpose"),
        ([Concatenate(dim=0)], r"Concatenate\(dim=0\)"),
        ([MergeModulelist(dim=1)], r"MergeModulelist\(dim=1\)"),
        ([MergeModulelist(dim=0), Concatenate(dim=2)], r"Concatenate\(dim=2\)"),
        ([MergeModulelist(dim=0), Concatenate(dim=1), Chunk(dim=0)], r"Chunk\(dim=0\)"),
    ],
)
def test_other_operation_is_refused_by_name(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, operations: list[object], named: str
) -> None:
    """Else the bytes would be right and their order would not."""
    converter = WeightConverter(["mlp.gate.weight"], ["mlp.gate.weight"], operations)
    monkeypatch.setattr(
        "ts_parallel.partition.match.get_model_conversion_mapping",
        lambda model: [*get_model_conversion_mapping(model), converter],
    )
    with pytest.raises(CheckpointError, match=rf"mlp\.gate\.weight' would have to be made of 'mlp\.gate.* by {named}"):
        match(mixtral)


def test_experts_that_are_stored_stacked_are_read_as_they_are(mixtral: Path, tmp_path: Path) -> None:
    fused = AutoModelForCausalLM.from_pretrained(mixtral).state_dict()
    (source,) = match(copy_of(mixtral, tmp_path, fused))[f"{EXPERTS}.gate_up_proj"]
    assert source == Source(replace(source.stored, name=f"{EXPERTS}.gate_up_proj"), (0, 0, 0))
