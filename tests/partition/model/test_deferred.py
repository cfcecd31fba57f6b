"""A model without its memory, and the memory that comes later: nothing too much, nothing left out."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from families import FAMILIES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ts_parallel.cli.plan import plan
from ts_parallel.errors import CheckpointError, ConfigError, PlanError
from ts_parallel.partition.build import shard_causal_lm
from ts_parallel.partition.model.deferred import build_deferred, materialise
from ts_parallel.partition.model.model_config import choose_dtype, read_model_config
from ts_parallel.topology import TensorParallelGroup

LLAMA_3_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
NUM_PARAMETERS_70B = 70_553_706_496
NUM_NORM_WEIGHTS_70B = (2 * 80 + 1) * 8192  # what every rank keeps whole
CPU = torch.device("cpu")
ROTARY = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
}


def non_persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name not in model.state_dict()}


@contextmanager
def at_most_500_mb_more() -> Iterator[None]:
    """The limit is for a model that is built with its memory after all: that is to fail, not to take the machine."""
    process = psutil.Process()
    memory, limits = process.memory_info(), resource.getrlimit(resource.RLIMIT_DATA)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (memory.data + 2**30, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert process.memory_info().rss - memory.rss < 500e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak < 500e6


def test_70b_model_is_planned_for_eight_ranks_without_its_memory() -> None:
    with at_most_500_mb_more():
        part = shard_causal_lm(LlamaConfig(**LLAMA_3_70B), torch.bfloat16, TensorParallelGroup(3, 8))
    assert all(parameter.is_meta for parameter in part.model.parameters())
    shapes = [torch.Size(entry.shape) for entry in part.plan.parameters.values()]
    assert sum(shape.numel() for shape in shapes) == NUM_PARAMETERS_70B
    assert sum(parameter.nbytes for parameter in part.model.parameters()) == part.plan.local_bytes(3)
    ranks = [part.plan.local_bytes(rank) for rank in range(8)]
    assert sum(ranks) == 2 * (NUM_PARAMETERS_70B + 7 * NUM_NORM_WEIGHTS_70B)
    assert set(ranks) == {ranks[0]}


def test_70b_model_is_planned_from_its_config_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **LLAMA_3_70B}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("COLUMNS", "160")
    started = time.process_time()
    with at_most_500_mb_more():
        plan(str(tmp_path), tensor_parallel_size=8)
    assert time.process_time() - started < 120  # traced, all of its 80 layers
    printed = capsys.readouterr().out
    megabytes = 2 * (NUM_PARAMETERS_70B + 7 * NUM_NORM_WEIGHTS_70B) / 8 / 1e6
    assert printed.count(f"{megabytes:,.1f}") == 8
    assert "dim 0 in 16032+16032+16032+16032+16032+16032+16032+16032" in printed
    # 80 layers × 1 key/value head × (128 + 128) × 2 bytes
    assert printed.count("40,960") == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_that_no_checkpoint_holds_are_those_of_a_normally_built_model(family: str, dtype: torch.dtype) -> None:
    config = FAMILIES[family]()
    model = build_deferred(config, dtype)
    materialise(model, CPU)
    expected = non_persistent_buffers(AutoModelForCausalLM.from_config(config, dtype=dtype))
    actual = non_persistent_buffers(model)
    assert actual.keys() == expected.keys()
    for name, buffer in expected.items():
        assert actual[name].dtype == buffer.dtype, name
        assert torch.equal(actual[name], buffer), name


def test_most_families_have_buffers_that_no_checkpoint_holds() -> None:
    """Or the test above would compare nothing with nothing."""
    with_buffers = {
        family for family in FAMILIES if non_persistent_buffers(build_deferred(FAMILIES[family](), torch.float32))
    }
    assert with_buffers == FAMILIES.keys() - {"gpt2", "opt"}


@pytest.mark.parametrize("rotary", ROTARY)
def test_scaled_rotary_frequencies_are_those_of_a_normally_built_model(rotary: str) -> None:
    config = FAMILIES["llama"](rope_parameters=ROTARY[rotary])
    model = build_deferred(config, torch.float32)
    materialise(model, CPU)
    expected = non_persistent_buffers(AutoModelForCausalLM.from_config(config))
    plain = non_persistent_buffers(AutoModelForCausalLM.from_config(FAMILIES["llama"]()))
    assert not torch.equal(expected["model.rotary_emb.inv_freq"], plain["model.rotary_emb.inv_freq"])
    for name, buffer in expected.items():
        assert torch.equal(non_persistent_buffers(model)[name], buffer), name
    assert (
        model.model.rotary_emb.attention_scaling
        == AutoModelForCausalLM.from_config(config).model.rotary_emb.attention_scaling
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "phi3", "stablelm"])
def test_sharding_leaves_the_buffers_as_they_were(family: str) -> None:
    """Rotary frequencies come from a head count, which sharding divides in the attention modules."""
    config = FAMILIES[family]()
    model = shard_causal_lm(config, torch.float32, TensorParallelGroup(1, 2)).model
    materialise(model, CPU)
    for name, buffer in non_persistent_buffers(AutoModelForCausalLM.from_config(config)).items():
        assert torch.equal(non_persistent_buffers(model)[name], buffer), name


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "starcoder2"])
def test_tied_parameters_stay_one(family: str, size: int) -> None:
    model = shard_causal_lm(FAMILIES[family](), torch.float32, TensorParallelGroup(0, size)).model
    materialise(model, CPU)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_parameters_that_are_not_tied_stay_two() -> None:
    model = build_deferred(FAMILIES["llama"](), torch.float32)
    materialise(model, CPU)
    model.get_input_embeddings().weight.fill_(1)
    model.get_output_embeddings().weight.fill_(2)
    assert model.get_input_embeddings().weight.max() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_without_memory(family: str) -> None:
    model = build_deferred(FAMILIES[family](), torch.bfloat16)
    assert all(tensor.is_meta for tensor in model.parameters())
    materialise(model, CPU)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device == CPU, name
        assert not tensor.requires_grad, name
    assert not model.training


def test_dtype_is_the_checkpoints_unless_another_is_asked_for() -> None:
    config = FAMILIES["llama"](dtype="bfloat16")
    assert choose_dtype("auto", config) == torch.bfloat16
    assert choose_dtype("float16", config) == torch.float16
    assert choose_dtype("auto", FAMILIES["llama"]()) == torch.float32


def test_dtype_that_cannot_be_computed_with_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch\.float8_e4m3fn cannot be computed with: set dtype"):
        choose_dtype("auto", FAMILIES["llama"](dtype="float8_e4m3fn"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no config.json in"),
        ("{", "is not a valid JSON file"),
        ("{}", "model_type"),
        ('{"model_type": "zork"}', "zork"),
        (
            '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 3}',
            "not a multiple of the number of attention heads",
        ),
        ('{"model_type": "llama", "dtype": "zork"}', "zork"),
        ('{"model_type": "llama", "hidden_size": "x"}', "Field 'hidden_size' expected int"),
        ('{"model_type": ["llama"]}', "unhashable"),
        ("3", "cannot read"),
        ("null", "cannot read"),
    ],
)
def test_config_that_cannot_be_read_is_refused_with_its_file(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_model_config(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_code_of_a_checkpoint_never_runs_whatever_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    config = {"model_type": "zork", "auto_map": {"AutoConfig": "zork.ZorkConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "zork.py").write_text(
        "import pathlib\n"
        "from transformers import PretrainedConfig\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class ZorkConfig(PretrainedConfig):\n"
        "    model_type = 'zork'\n"
    )
    with pytest.raises(CheckpointError):
        read_model_config(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_model_that_generates_no_text_is_refused_by_its_type() -> None:
    with pytest.raises(PlanError, match="model type 't5' cannot be served"):
        build_deferred(CONFIG_MAPPING["t5"](), torch.float32)
