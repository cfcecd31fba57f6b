"""The way of a weight from file to device: found under its name, read whole, converted, and nothing else is opened."""

from __future__ import annotations

import logging
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from whole_model import build_rank_model

from ts_parallel.checkpoint.index import CheckpointIndex, read_index
from ts_parallel.errors import CheckpointError
from ts_parallel.partition import build
from ts_parallel.partition.build import (
    StagedModel,
    all_tensors,
    build_eager_model,
    program_of,
    shard_causal_lm,
)
from ts_parallel.partition.load import RankModel
from ts_parallel.partition.model.model_config import read_model_config
from ts_parallel.partition.program import PipelinePlace, ProgramRequest
from ts_parallel.topology import TensorParallelGroup

TIED = ["gpt2", "gemma2", "opt", "starcoder2"]
ALONE = TensorParallelGroup(0, 1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family. Tests that change one work on a copy."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        save_random_model(folder, FAMILIES[family](num_hidden_layers=2))
    return folders


def build_part(folder: Path, dtype: str = "float32", group: TensorParallelGroup = ALONE) -> RankModel:
    """Untraced: that takes less time, and the way of a weight is the same."""
    return build_eager_model(folder, dtype, group, torch.device("cpu"))


def change(original: Path, folder: Path, **renamed: str) -> dict[str, torch.Tensor]:
    """The tensors of a copy of `original` in `folder`, with every `old` in their names replaced by its `new`."""
    shutil.copy(original / "config.json", folder)
    tensors = load_file(original / "model.safetensors")
    for old, new in renamed.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def assert_equal_parameters(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    theirs = dict(expected.named_parameters(remove_duplicate=False))
    ours = dict(actual.named_parameters(remove_duplicate=False))
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert ours[name].dtype == parameter.dtype, name
        assert torch.equal(ours[name], parameter), name


@pytest.mark.parametrize("family", FAMILIES)
def test_one_ranks_parameters_are_those_that_transformers_loads(family: str, checkpoints: dict[str, Path]) -> None:
    part = build_part(checkpoints[family])
    assert_equal_parameters(part.model, AutoModelForCausalLM.from_pretrained(checkpoints[family]))
    for name, tensor in [*part.model.named_parameters(), *part.model.named_buffers()]:
        assert not tensor.is_meta, name
    assert [len(sites) for sites in part.program.sites_of_ranks] == [2]
    assert part.tensors == all_tensors(part.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_together_hold_every_parameter(family: str, checkpoints: dict[str, Path]) -> None:
    stored = AutoModelForCausalLM.from_pretrained(checkpoints[family]).state_dict()
    parts = [build_part(checkpoints[family], group=TensorParallelGroup(rank, 2)) for rank in range(2)]
    for name, entry in parts[0].program.plan.parameters.items():
        whole = torch.full(entry.shape, float("nan"))
        for rank, part in enumerate(parts):
            local = part.tensors[name]
            if entry.slices is None:
                whole = local
                assert torch.equal(local, stored[name]), name
                continue
            kept, start = entry.slices[rank], 0
            for begin, length in kept.pieces:
                whole.narrow(kept.dim, begin, length).copy_(local.narrow(kept.dim, start, length))
                start += length
        assert torch.equal(whole, stored[name]), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_rank_of_a_stage_holds_its_own_parameters_and_no_others(family: str, checkpoints: dict[str, Path]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoints[family]).state_dict()
    held = []
    for rank in range(2):
        part = build_rank_model(checkpoints[family], "float32", ALONE, torch.device("cpu"), PipelinePlace(rank, 2))
        program = part.program
        for entry in program.plan.parameters.values():
            for name in (entry.name, *entry.aliases):
                assert torch.equal(part.tensors[name], plain[name]), name
        named = {alias for entry in program.plan.parameters.values() for alias in (entry.name, *entry.aliases)}
        assert part.tensors.keys() == named | program.buffers.keys()
        assert program.plan.parameters.keys() < program.whole_plan.parameters.keys()
        held.append(program.plan.parameters.keys())
    assert held[0] | held[1] == program.whole_plan.parameters.keys()
    assert held[0] & held[1] == {entry.name for entry in program.plan.parameters.values() if entry.aliases}


def test_tensor_that_another_rank_misses_is_missed_by_all(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Or one rank would wait for another that has given up."""
    tensors = change(checkpoints["llama"], tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    for rank in range(2):
        with pytest.raises(CheckpointError, match=r"no tensor for 'model\.layers\.1\.mlp\.up_proj\.weight'"):
            build_rank_model(tmp_path, "float32", ALONE, torch.device("cpu"), PipelinePlace(rank, 2))


@pytest.mark.parametrize(("stored", "wanted"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_stored_dtype_is_converted_to_the_one_asked_for(stored: torch.dtype, wanted: str, tmp_path: Path) -> None:
    save_random_model(tmp_path, FAMILIES["gpt2"](num_hidden_layers=2), dtype=stored)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, wanted))
    assert_equal_parameters(build_part(tmp_path, wanted).model, expected)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {stored}


def test_auto_is_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    save_random_model(tmp_path, FAMILIES["llama"](num_hidden_layers=1), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in build_part(tmp_path, "auto").model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpoint_in_several_files_is_read(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoints[family])
    plain.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_equal_parameters(build_part(tmp_path).model, plain)


def test_missing_tensor_is_refused_by_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = change(checkpoints["llama"], tmp_path)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    message = r"no tensor for 'model\.layers\.0\.mlp\.up_proj\.weight' and 1 more of LlamaForCausalLM"
    with pytest.raises(CheckpointError, match=message):
        build_part(tmp_path)


def test_tensor_of_another_shape_is_refused_with_both_shapes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = change(checkpoints["llama"], tmp_path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 128)
    save_file(tensors, tmp_path / "model.safetensors")
    message = r"'model\.layers\.1\.mlp\.up_proj\.weight' has shape \[64, 128\] in .*, not \[128, 64\]"
    with pytest.raises(CheckpointError, match=message):
        build_part(tmp_path)


def test_extra_tensors_are_counted_in_the_log_and_no_more(
    checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = change(checkpoints["llama"], tmp_path)
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for layer in range(2)}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO):
        model = build_part(tmp_path).model
    assert "2 tensors of the checkpoint belong to no parameter of LlamaForCausalLM" in caplog.text
    assert_equal_parameters(model, AutoModelForCausalLM.from_pretrained(checkpoints["llama"]))


def test_layer_beyond_the_models_last_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = change(checkpoints["llama"], tmp_path)
    tensors["model.layers.4.mlp.up_proj.weight"] = torch.zeros(128, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.4\.mlp\.up_proj\.weight', for which LlamaForCausalLM has"
    ):
        build_part(tmp_path)


def test_checkpoint_that_fits_is_not_said_to_have_extra_tensors(
    checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        build_part(checkpoints["gpt2"])
    assert "belong to no parameter" not in caplog.text


def test_checkpoint_of_the_base_model_alone_is_accepted(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """As openai-community/gpt2 is: no prefix, and each layer's causal mask among its tensors."""
    tensors = change(checkpoints["gpt2"], tmp_path, **{"transformer.": ""})
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256) for layer in range(2)}
    assert "wte.weight" in tensors and "lm_head.weight" not in tensors
    save_file({**tensors, **masks}, tmp_path / "model.safetensors")
    assert_equal_parameters(build_part(tmp_path).model, AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"]))


def test_old_name_of_a_head_is_accepted(checkpoints: dict[str, Path]) -> None:
    assert "embed_out.weight" in load_file(checkpoints["gpt_neox"] / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(checkpoints["gpt_neox"]).lm_head.weight
    assert torch.equal(build_part(checkpoints["gpt_neox"]).model.lm_head.weight, expected)


def test_fused_experts_under_the_old_name_of_their_module_are_accepted(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Mixtral's own files have `block_sparse_moe`, and the experts one by one."""
    fused = AutoModelForCausalLM.from_pretrained(checkpoints["mixtral"], dtype=torch.bfloat16)
    shutil.copy(checkpoints["mixtral"] / "config.json", tmp_path)
    tensors = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in fused.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal_parameters(build_part(tmp_path, "bfloat16").model, fused)


@pytest.mark.parametrize("family", TIED)
def test_tied_weight_is_found_under_either_name(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    part = shard_causal_lm(read_model_config(checkpoints[family]), torch.float32, ALONE)
    tied = next(entry for entry in part.plan.parameters.values() if entry.aliases)
    tensors = change(checkpoints[family], tmp_path)
    assert tied.name in tensors and "lm_head.weight" in tied.aliases
    tensors["lm_head.weight"] = tensors.pop(tied.name)
    save_file(tensors, tmp_path / "model.safetensors")
    model = build_part(tmp_path).model
    assert_equal_parameters(model, AutoModelForCausalLM.from_pretrained(checkpoints[family]))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (self._path,))  # type: ignore[return-value]


_opened: list[str] | None = None


def note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(note_opened)  # cannot be removed again, so it listens only while `opened_files` is entered


@contextmanager
def opened_files() -> Iterator[list[str]]:
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def test_pickled_weights_are_never_opened(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["llama"], folder)
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (folder / name).write_bytes(payload)
    with opened_files() as opened:
        build_part(folder)
    assert str(folder / "model.safetensors") in opened  # or nothing was heard at all
    assert not [name for name in opened if name.endswith((".bin", ".pt"))]
    assert not (tmp_path / "ran").exists()
    pickle.loads(payload)
    assert (tmp_path / "ran").exists()  # the payload would have told


def test_pickle_that_is_no_checkpoint_is_refused_and_not_run(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(checkpoints["llama"] / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        build_part(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("family", "changes", "num_traces"),
    [
        ("llama", {"vocab_size": 96, "num_key_value_heads": 1}, 1),
        ("olmo2", {}, 1),  # whose output projections cut their own part out
        ("mixtral", {}, 1),
        ("llama", {"vocab_size": 96, "intermediate_size": 130}, 2),  # 33 + 33 + 33 + 31
        ("stablelm", {"qk_layernorm": True}, 4),  # a norm for each head, by the head's own name
    ],
)
def test_ranks_that_run_the_same_code_share_a_trace(
    family: str, changes: dict[str, Any], num_traces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random_model(tmp_path, FAMILIES[family](num_hidden_layers=1, **changes))
    traced = []
    whole = build.stage_model

    def noted(request: ProgramRequest, rank: int, *index: CheckpointIndex) -> StagedModel:
        traced.append(rank)
        return whole(request, rank, *index)

    monkeypatch.setattr(build, "stage_model", noted)
    request, index = ProgramRequest(tmp_path, "float32", 0, 4), read_index(tmp_path)
    programs = build.make_programs(request, index)
    assert len(traced) == num_traces
    for (rank, _), program in programs.items():
        own = program_of(whole(request, rank), PipelinePlace(), {})
        assert program.bytes_of_ranks == (max(program.plan.local_bytes(other) for other in range(4)),)
        assert [stage.source for stage in program.stages] == [stage.source for stage in own.stages]
        assert [stage.globals.keys() for stage in program.stages] == [stage.globals.keys() for stage in own.stages]


def test_ranks_of_a_stage_agree_on_its_borders_whatever_they_weigh(tmp_path: Path) -> None:
    """With an odd vocabulary the last rank's head is lighter, and alone it would cut elsewhere."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    save_random_model(tmp_path, FAMILIES["llama"](**sizes, head_dim=4, vocab_size=287))
    request = ProgramRequest(tmp_path, "float32", 0, 2, PipelinePlace(0, 2))
    alone = [build.stage_model(request, rank).borders for rank in range(2)]
    assert alone[0] != alone[1]
    programs = build.make_programs(request, read_index(tmp_path))
    layers = {own: [len(sites) for sites in program.sites_of_ranks] for own, program in programs.items()}
    assert len(layers) == 4 and len(set(map(tuple, layers.values()))) == 1
