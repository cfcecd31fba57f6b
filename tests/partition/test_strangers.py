"""What a checkpoint holds beside a model's weights, its config.json being silent: refused by name, or harmless."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, TINY_FAMILIES, save_random_model
from safetensors.torch import load_file, save_file
from seq2seq_models import TEXT
from seq2seq_models import save as save_seq2seq
from transformers import AutoModel, AutoModelForCausalLM, BertConfig

from ts_parallel.checkpoint.index import read_index
from ts_parallel.cli.plan import plan
from ts_parallel.errors import CheckpointError
from ts_parallel.partition import build
from ts_parallel.partition.build import build_eager_model, make_programs
from ts_parallel.partition.program import ProgramRequest
from ts_parallel.topology import TensorParallelGroup

COMMAND = str(Path(sys.executable).parent / "ts-parallel")
ALONE, CPU = TensorParallelGroup(0, 1), torch.device("cpu")
LAYER, UP = "model.layers.0", "model.layers.0.mlp.up_proj"
FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor], Tensors]
"""A linear's weight → what a format stores instead, by the ends of its names."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's checkpoint, made when it is first asked for. Tests change it in a copy."""
    folders: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in folders:
            folder = folders[family] = tmp_path_factory.mktemp(family)
            if family == "bert":
                sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
                AutoModel.from_config(BertConfig(**sizes, vocab_size=97)).save_pretrained(folder)
            elif family == "t5":
                save_seq2seq(folder, "t5")
            elif family in FAMILIES:
                save_random_model(folder, FAMILIES[family](num_hidden_layers=1))
            else:
                save_random_model(folder, TINY_FAMILIES[family]())
        return folders[family]

    return of


def changed(original: Path, folder: Path, tensors: Tensors) -> Path:
    (folder / "config.json").write_text((original / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors")
    return folder


def encoded(original: Path, change: Change, suffix: str = "_proj.weight") -> Tensors:
    """The weights of `original`, those whose names end with `suffix` as `change` has them."""
    tensors: Tensors = {}
    for name, tensor in load_file(original / "model.safetensors").items():
        if name.endswith(suffix):
            tensors |= {f"{name.removesuffix('weight')}{end}": value for end, value in change(tensor).items()}
        else:
            tensors[name] = tensor
    return tensors


def bits(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def refusal_of(road: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as refusal:
        road()
    return str(refusal.value)


# The config.json of each says nothing.
FORMATS: dict[str, tuple[Change, str]] = {
    "FP8 with a scale for each tensor": (
        lambda weight: {"weight": weight.to(FP8), "weight_scale": torch.ones(()), "input_scale": torch.ones(())},
        "_proj.weight_scale', which quantised weights have (scales of",
    ),
    "FP8 with scales of blocks": (
        lambda weight: {"weight": weight.to(FP8), "weight_scale_inv": torch.ones(1, 1)},
        "_proj.weight_scale_inv', which quantised weights have (scales of",
    ),
    "compressed-tensors int8": (
        lambda weight: {"weight": bits(*weight.shape, dtype=torch.int8), "weight_scale": torch.ones(len(weight), 1)},
        "_proj.weight_scale', which quantised weights have (scales of",
    ),
    "compressed-tensors int4": (
        lambda weight: {
            "weight_packed": bits(len(weight), 8),
            "weight_scale": torch.ones(1),
            "weight_shape": bits(2, dtype=torch.int64),
        },
        "_proj.weight_packed', which quantised weights have (scales of",
    ),
    "GPTQ": (
        lambda weight: {"qweight": bits(8, 8), "qzeros": bits(1, 8), "scales": torch.ones(1, 8), "g_idx": bits(64)},
        "_proj.g_idx', which quantised weights have (GPTQ or AWQ)",
    ),
    "AWQ": (
        lambda weight: {"qweight": bits(8, 8), "qzeros": bits(1, 8), "scales": torch.ones(1, 8)},
        "_proj.qweight', which quantised weights have (GPTQ or AWQ)",
    ),
    "bitsandbytes int8": (
        lambda weight: {"weight": bits(*weight.shape, dtype=torch.int8), "SCB": torch.ones(len(weight))},
        "_proj.SCB', which quantised weights have (bitsandbytes)",
    ),
    "bitsandbytes nf4": (
        lambda weight: {
            "weight": bits(weight.numel() // 2, 1, dtype=torch.uint8),
            "weight.absmax": torch.ones(4),
            "weight.quant_map": torch.ones(16),
            "weight.quant_state.bitsandbytes__nf4": bits(90, dtype=torch.uint8),
        },
        "_proj.weight.absmax', which quantised weights have (bitsandbytes)",
    ),
    "MLX": (
        lambda weight: {
            "weight": bits(len(weight), 8, dtype=torch.uint32),
            "scales": torch.ones(len(weight), 1),
            "biases": torch.ones(len(weight), 1),
        },
        "is uint32 where LlamaForCausalLM has weights, so it is quantised",
    ),
    "integers alone": (
        lambda weight: {"weight": bits(*weight.shape, dtype=torch.int8)},
        "is int8 where LlamaForCausalLM has weights, so it is quantised",
    ),
    "exponents alone": (
        lambda weight: {"weight": weight.abs().to(torch.float8_e8m0fnu)},
        "is float8_e8m0fnu where LlamaForCausalLM has weights, so it is quantised",
    ),
    "scales by another name": (
        lambda weight: {"weight": weight.to(FP8), "multiplier": torch.ones(())},
        "for which 'model.layers.0.mlp.down_proj' of LlamaForCausalLM has no place",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_weights_are_refused_before_anything_is_traced(
    name: str, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, says = FORMATS[name]
    monkeypatch.delattr(build, "cut_causal_lm")
    folder = changed(saved("llama"), tmp_path, encoded(saved("llama"), change))
    request, index = ProgramRequest(folder, "float32", 0, 2), read_index(folder)
    line = refusal_of(lambda: make_programs(request, index))
    assert says in line and "\n" not in line
    assert refusal_of(lambda: plan(str(folder))) == line
    assert refusal_of(lambda: build_eager_model(folder, "float32", ALONE, CPU)) == line


def blocks_of_experts(original: Path) -> Tensors:
    """As gpt-oss stores its experts in MXFP4."""
    tensors = load_file(original / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts = len(tensors.pop(name))
        tensors[f"{name}_blocks"] = bits(experts, 8, 2, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = bits(experts, 8, 2, dtype=torch.uint8)
    return tensors


def scaled_experts(original: Path) -> Tensors:
    """As Qwen3's mixtures of experts are stored in FP8: one by one."""
    return encoded(original, lambda weight: {"weight": weight.to(FP8), "weight_scale_inv": torch.ones(1, 1)})


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("gpt_oss", blocks_of_experts, "experts.down_proj_blocks', which quantised weights have (MXFP4)"),
        ("qwen3_moe", scaled_experts, "_scale_inv', which quantised weights have (scales of"),
    ],
)
def test_quantised_experts_are_refused_by_name(
    family: str, change: Callable[[Path], Tensors], says: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        build_eager_model(changed(saved(family), tmp_path, change(saved(family))), "float32", ALONE, CPU)
    assert says in str(refusal.value)


@pytest.mark.parametrize(("family", "task", "suffix"), [("bert", "encoder", "dense.weight"), ("t5", TEXT, "q.weight")])
def test_quantised_model_of_another_task_is_refused_by_name(
    family: str, task: str, suffix: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    def change(weight: torch.Tensor) -> Tensors:
        return {"weight": weight.to(FP8), "weight_scale": torch.ones(())}

    folder = changed(saved(family), tmp_path, encoded(saved(family), change, suffix))
    with pytest.raises(CheckpointError, match=r"weight_scale', which quantised weights have"):
        make_programs(ProgramRequest(folder, "float32", 0, 1, task=task), read_index(folder))


@pytest.mark.parametrize(
    "name",
    [
        f"{UP}.bias",
        f"{UP}.lora_A.weight",
        f"{UP}.lora_magnitude_vector.weight",
        f"{LAYER}.self_attn.q_norm.weight",  # of Qwen3, which has a norm that Llama lacks
        f"{LAYER}.self_attn.sinks",
        "layers.0.mlp.up_proj.bias",  # as of the base model alone
        "lm_head.bias",
    ],
)
def test_tensor_for_which_a_module_has_no_place_is_refused_by_name(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = {**load_file(saved("llama") / "model.safetensors"), name: torch.ones(4)}
    with pytest.raises(CheckpointError, match=f"holds '{name}', for which '.*' of LlamaForCausalLM has no place"):
        build_eager_model(changed(saved("llama"), tmp_path, tensors), "float32", ALONE, CPU)


HARMLESS: dict[str, list[str]] = {
    "llama": [
        f"{LAYER}.self_attn.rotary_emb.inv_freq",
        f"{LAYER}.self_attn.rotary_emb.cos_cached",
        "model.rotary_emb.inv_freq",
        "mtp.layers.0.mlp.up_proj.weight",
        "model.mtp.fc.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "v_head.summary.weight",
        "logit_scale",
    ],
    "gpt2": ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
    "gpt_neox": ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"],
}


@pytest.mark.parametrize("family", HARMLESS)
def test_tensors_of_other_parts_and_of_older_versions_are_passed_over(
    family: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = load_file(saved(family) / "model.safetensors")
    extra = {name: torch.ones(4) for name in HARMLESS[family]}
    ours = build_eager_model(changed(saved(family), tmp_path, {**tensors, **extra}), "float32", ALONE, CPU).tensors
    for name, tensor in AutoModelForCausalLM.from_pretrained(saved(family)).state_dict().items():
        assert torch.equal(ours[name], tensor)


def test_heads_and_ids_beside_an_encoder_are_passed_over(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """As a BERT that was trained on masked words has them, under the prefix of the base model."""
    own = load_file(saved("bert") / "model.safetensors")
    tensors = {f"bert.{name}": tensor for name, tensor in own.items()}
    tensors |= {"bert.embeddings.position_ids": torch.arange(4)[None], "cls.predictions.bias": torch.ones(97)}
    folder = changed(saved("bert"), tmp_path, tensors)
    programs = make_programs(ProgramRequest(folder, "float32", 0, 1, task="encoder"), read_index(folder))
    assert programs[0, 0].sources


def test_numbers_of_eight_bits_without_any_scale_are_what_they_say(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = encoded(saved("llama"), lambda weight: {"weight": weight.to(FP8)})
    ours = build_eager_model(changed(saved("llama"), tmp_path, tensors), "float32", ALONE, CPU).tensors
    assert torch.equal(ours[f"{UP}.weight"], tensors[f"{UP}.weight"].float())


def test_numbers_of_eight_bits_with_scales_anywhere_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = encoded(saved("llama"), lambda weight: {"weight": weight.to(FP8)}) | {"fp8_scales": torch.ones(7)}
    with pytest.raises(CheckpointError, match=r"has numbers of eight bits, and there is 'fp8_scales'"):
        build_eager_model(changed(saved("llama"), tmp_path, tensors), "float32", ALONE, CPU)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint32, torch.uint16])
def test_dtype_that_no_weight_has_is_passed_over_where_nobody_reads_it(
    dtype: torch.dtype, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors: dict[str, Any] = load_file(saved("llama") / "model.safetensors")
    folder = changed(saved("llama"), tmp_path, {**tensors, "mtp.table": torch.ones(4, dtype=torch.float32).to(dtype)})
    assert build_eager_model(folder, "float32", ALONE, CPU).num_bytes


def test_whole_command_refuses_on_one_line_before_torchserve(saved: Callable[[str], Path], tmp_path: Path) -> None:
    change, _ = FORMATS["FP8 with a scale for each tensor"]
    folder = changed(saved("llama"), tmp_path, encoded(saved("llama"), change))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "JAVA_HOME": str(tmp_path / "none")}
    command = [COMMAND, "serve", str(folder), "--tensor-parallel-size", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 1
    *phases, line = result.stderr.splitlines()
    assert not any("TorchServe" in phase for phase in phases)
    assert line.startswith("ts-parallel: ")
    assert "which quantised weights have (scales of FP8, FP4 or integers): this package does not read" in line
