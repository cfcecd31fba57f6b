"""A rank that loads its part of a large checkpoint needs memory for that part, not for the whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from places import RANKS
from safetensors.torch import save_file
from transformers import PretrainedConfig

from ts_parallel.partition.model.deferred import build_deferred
from ts_parallel.partition.prepared import CACHE_VARIABLE

SCRIPT = RANKS / "peak_memory.py"
LARGE = FAMILIES["llama"](
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=5,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=8192,
    dtype="bfloat16",
)
# MB. A build of torch for CUDA takes 527 as soon as it is imported, GPU or not; that for the CPU 229.
PYTHON_AND_TORCH = 350.0 if torch.version.cuda is None else 650.0


def save_large_model(folder: Path, config: PretrainedConfig) -> int:
    """A checkpoint of one file a tensor, so that writing it takes no more memory than the largest; its bytes."""
    weight_map, num_bytes = {}, 0
    for number, (name, parameter) in enumerate(build_deferred(config, torch.bfloat16).named_parameters()):
        weight_map[name] = f"model-{number:05}.safetensors"
        save_file({name: torch.empty_like(parameter, device="cpu").fill_(0.01)}, folder / weight_map[name])
        num_bytes += parameter.nbytes
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(folder)
    return num_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Is emptied at once: pytest would keep the folders of its last three runs."""
    folder = tmp_path / "large"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def save_quantised_model(folder: Path, config: PretrainedConfig) -> int:
    """The same, its linears stored as integers of GPTQ's, four bits each; the bytes of its weights in bfloat16."""
    weight_map, num_bytes = {}, 0
    for number, (name, parameter) in enumerate(build_deferred(config, torch.bfloat16).named_parameters()):
        module, stem = name.removesuffix(".weight"), f"model-{number:05}.safetensors"
        num_bytes += parameter.nbytes
        if ".layers." in name and parameter.ndim == 2:
            outputs, inputs = parameter.shape
            tensors = {
                f"{module}.qweight": torch.full((inputs // 8, outputs), 0x12345678, dtype=torch.int32),
                f"{module}.qzeros": torch.full((inputs // 128, outputs // 8), 0x77777777, dtype=torch.int32),
                f"{module}.scales": torch.full((inputs // 128, outputs), 0.01, dtype=torch.float16),
            }
        else:
            tensors = {name: torch.empty_like(parameter, device="cpu").fill_(0.01)}
        weight_map |= dict.fromkeys(tensors, stem)
        save_file(tensors, folder / stem)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(folder)
    section = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    content = {**json.loads((folder / "config.json").read_text()), "quantization_config": section}
    (folder / "config.json").write_text(json.dumps(content))
    return num_bytes


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("tp", "pp", "save"), [(2, 1, save_large_model), (1, 2, save_large_model), (2, 1, save_quantised_model)]
)
def test_rank_peaks_at_its_own_part_of_the_checkpoint(
    tp: int, pp: int, save: Callable[[Path, PretrainedConfig], int], folder: Path, tmp_path: Path
) -> None:
    """Traced, cut, loaded, and with its linears packed, which must not hold them twice; nor codes beside weights."""
    num_bytes = save(folder, LARGE)
    assert num_bytes > 500e6
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        CACHE_VARIABLE: str(tmp_path / "programs"),
    }
    result = subprocess.run(
        [*command, str(folder), str(tp), str(pp)], capture_output=True, text=True, timeout=180, env=environment
    )
    assert result.returncode == 0, result.stderr
    ranks = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(rank["rank"] for rank in ranks) == [0, 1]
    for rank in ranks:
        assert rank["own_mb"] == pytest.approx(num_bytes / 2e6, rel=0.02 if tp == 2 else 0.2), rank
        assert rank["peak_mb"] <= rank["own_mb"] * 1.15 + PYTHON_AND_TORCH, rank
        assert rank["peak_mb"] > rank["start_mb"] + rank["own_mb"] * 0.75, rank  # with 12 of a packed number's 16 bits
