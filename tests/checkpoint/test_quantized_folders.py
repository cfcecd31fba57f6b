"""What the files of a checkpoint say of its weights: nothing that is not understood is passed over, on no road in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file

from ts_parallel.checkpoint.conversion.convert import convert
from ts_parallel.checkpoint.conversion.write_safetensors import Safetensors
from ts_parallel.checkpoint.formats.dcp import METADATA
from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.quantized import format_of, refuse_quantized
from ts_parallel.cli.plan import plan
from ts_parallel.cli.server.archive import archive, handler_config
from ts_parallel.cli.server.serve import check
from ts_parallel.cli.verify import verify
from ts_parallel.errors import CheckpointError, StartupError
from ts_parallel.partition.build import build_eager_model
from ts_parallel.partition.prepared import prepare_program
from ts_parallel.partition.program import ProgramRequest
from ts_parallel.serving.offline import open_model
from ts_parallel.topology import TensorParallelGroup

TORCHAO = {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": "int4_weight_only"}}}
MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
}
RECIPE = "default_stage:\n  default_modifiers:\n    {}:\n      targets: [Linear]\n      ignore: [lm_head]\n"

# File, what stands in it, what the line that refuses it says after the file's name.
SAID: list[tuple[str, Any, str]] = [
    ("config.json", TORCHAO, "says quantization_config: quant_method 'torchao'"),
    (
        "config.json",
        {"text_config": {"quantization_config": {"quant_method": "hqq", "bits": 4, "group_size": 128}}},
        "says text_config.quantization_config: quant_method 'hqq', bits 4",
    ),
    (
        "config.json",
        {"quantization_config": {"quant_method": "quark", "format": "int-quantized"}},
        "says quantization_config: quant_method 'quark', format 'int-quantized'",
    ),
    (
        "config.json",
        {"compression_config": {"format": "pack-quantized"}},
        "compression_config: format 'pack-quantized'",
    ),
    ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "says quantization: bits 4, group_size 64"),
    ("config.json", {"quantization_config": {"a": 1}}, "says quantization_config: {'a': 1}"),
    ("config.json", {"quantization_bit": 4}, "says quantization_bit: 4"),
    ("config.json", {"thinker": [{"quantization": "w8a8"}]}, "says thinker.0.quantization: 'w8a8'"),
    (
        "config.json",
        {"quantization_config": {"quant_method": "spqr", "bits": 3}},
        "says quantization_config: quant_method 'spqr', bits 3",
    ),
    ("hf_quant_config.json", MODELOPT, "says quantization: quant_algo 'NVFP4'"),
    ("quantize_config.json", {"bits": 4, "group_size": 128}, "says bits 4, group_size 128"),
    ("quantization_config.json", {"quant_method": "auto-round"}, "says quant_method 'auto-round'"),
    ("quant_model_description_w8a8.json", {"model.norm.weight": "FLOAT"}, "says {'model.norm.weight': 'FLOAT'}"),
    ("recipe.yaml", RECIPE.format("GPTQModifier"), "says 'GPTQModifier'"),
]
SILENT: list[tuple[str, Any]] = [
    ("config.json", {"quantization_config": None, "quantization": {}, "quantization_bit": 0, "compression_config": ""}),
    ("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False, "bits": 4}}),
    ("config.json", {"quant_mode": True, "use_cache_quantization": True, "quantization_levels": [4, 4]}),
    ("config.json", "{no JSON"),
    ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None}}),
    ("recipe.yaml", RECIPE.format("SparseGPTModifier")),
]


def write(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(("name", "content", "says"), SAID)
def test_what_a_file_says_of_the_weights_is_refused_on_one_line(
    name: str, content: Any, says: str, tmp_path: Path
) -> None:
    write(tmp_path, name, content)
    with pytest.raises(CheckpointError) as refusal:
        refuse_quantized(tmp_path)
    line = str(refusal.value)
    assert line.startswith(f"{tmp_path / name} ") and says in line
    assert line.endswith("does not read such weights yet; serve the checkpoint in bfloat16 or float16")
    assert "\n" not in line


@pytest.mark.parametrize(("name", "content"), SILENT)
def test_file_that_says_nothing_of_the_weights_is_no_reason_to_refuse(name: str, content: Any, tmp_path: Path) -> None:
    write(tmp_path, name, content)
    refuse_quantized(tmp_path)


def test_file_that_would_say_it_and_cannot_be_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "quantize_config.json", "{")
    with pytest.raises(
        CheckpointError, match=r"quantize_config\.json, which says how the weights are quantised, cannot"
    ):
        refuse_quantized(tmp_path)


def test_configuration_above_a_distributed_checkpoint_and_in_a_named_folder_counts(tmp_path: Path) -> None:
    write(tmp_path / "job", "config.json", TORCHAO)
    write(tmp_path / "job" / "step-10", METADATA, "")
    with pytest.raises(CheckpointError, match=r"job/config\.json says quantization_config"):
        refuse_quantized(tmp_path / "job" / "step-10")
    write(tmp_path / "weights", "config.json", {})
    with pytest.raises(CheckpointError, match=r"job/config\.json says quantization_config"):
        refuse_quantized(tmp_path / "weights", tmp_path / "job")
    write(tmp_path / "weights", "hf_quant_config.json", MODELOPT)
    write(tmp_path / "plain", "config.json", {})
    with pytest.raises(CheckpointError, match=r"weights/hf_quant_config\.json says quantization"):
        refuse_quantized(tmp_path / "weights", tmp_path / "plain")


def load_offline(folder: Path) -> None:
    with open_model(folder):
        pass


ROADS: dict[str, Callable[[Path], object]] = {
    "plan": lambda folder: plan(str(folder)),
    "serve": lambda folder: check(handler_config(folder, "cpu"), folder),
    "verify": lambda folder: verify(str(folder)),
    "archive": lambda folder: archive(str(folder), export_path=folder / "store"),
    "convert": lambda folder: convert(folder, folder / "new", Safetensors()),
    "open_model": load_offline,
    "a worker": lambda folder: prepare_program(ProgramRequest(folder, "auto", 0, 1), read_index(folder)),
    "a worker of another task": lambda folder: prepare_program(
        ProgramRequest(folder, "auto", 0, 1, task="encoder"), read_index(folder)
    ),
    "an eager worker": lambda folder: build_eager_model(folder, "auto", TensorParallelGroup(0, 1), torch.device("cpu")),
}


@pytest.mark.parametrize("road", ROADS)
def test_no_road_passes_over_what_a_file_says(road: str, tmp_path: Path) -> None:
    """Each reads a folder of which everything else is right."""
    FAMILIES["llama"](num_hidden_layers=1).save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    write(tmp_path, "hf_quant_config.json", MODELOPT)
    with pytest.raises(StartupError, match=r"hf_quant_config\.json says quantization: quant_algo 'NVFP4'"):
        ROADS[road](tmp_path)


@pytest.mark.parametrize("road", ["archive", "convert"])
def test_names_alone_are_enough_where_no_model_is_built(road: str, tmp_path: Path) -> None:
    write(tmp_path, "config.json", {})
    tensors = {"a.weight": torch.zeros(2).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 'a\.weight_scale_inv', which quantised weights have \(scales of"):
        ROADS[road](tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.0.mlp.experts.down_proj_blocks", "MXFP4"),
        ("model.layers.0.mlp.experts.gate_up_proj_scale_inv", "scales of FP8, FP4 or integers"),
        ("model.layers.0.mlp.up_proj.weight", None),
        ("model.layers.0.attn.bias", None),
        ("logit_scale", None),
        ("scales", None),
        ("model.blocks.0.layer_scale", None),
    ],
)
def test_name_of_a_tensor_tells_whose_weights_have_it(name: str, kind: str | None) -> None:
    assert format_of(name) == kind
