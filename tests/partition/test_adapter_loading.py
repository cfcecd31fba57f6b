"""Each rank's weights with an adapter are those of the checkpoint into which it was merged before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, random_model
from safetensors.torch import save_file

from ts_parallel.checkpoint.adapter import read_adapter
from ts_parallel.checkpoint.index import read_index
from ts_parallel.partition.build import make_programs
from ts_parallel.partition.load import load_program
from ts_parallel.partition.program import PipelinePlace, ProgramRequest
from ts_parallel.topology import TensorParallelGroup

SCALE = 2.0


def save(folder: Path, family: str) -> list[str]:
    """`base`, `adapter`, and `merged`; the weights that the adapter changes."""
    model = random_model(FAMILIES[family]())
    model.save_pretrained(folder / "base")
    is_transposed = family == "gpt2"
    factors, changed = {}, []
    for name, module in model.named_modules():
        if name.split(".")[-1] in ("q_proj", "down_proj", "c_attn"):
            outputs, inputs = reversed(module.weight.shape) if is_transposed else module.weight.shape
            down, up = torch.randn(4, inputs) / 4, torch.randn(outputs, 4) / 4
            factors[f"base_model.model.{name}.lora_A.weight"] = down
            factors[f"base_model.model.{name}.lora_B.weight"] = up
            module.weight.data += SCALE * (up @ down).T if is_transposed else SCALE * up @ down
            changed.append(f"{name}.weight")
    model.save_pretrained(folder / "merged")
    (folder / "adapter").mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "fan_in_fan_out": is_transposed}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return changed


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rank_merges_what_it_keeps(family: str, tmp_path: Path) -> None:
    changed = save(tmp_path, family)
    indexes = {name: read_index(tmp_path / name) for name in ("base", "merged")}
    merge = read_adapter(tmp_path / "adapter", indexes["base"]).merge
    request = ProgramRequest(tmp_path / "base", "float32", 0, 2, PipelinePlace(0, 2))
    seen = set()
    for (rank, _), program in make_programs(request, indexes["base"]).items():
        group = TensorParallelGroup(rank, 2)
        base, own, merged = (
            load_program(program, indexes[name], group, torch.device("cpu"), merge=function).tensors
            for name, function in (("base", lambda _: None), ("base", merge), ("merged", lambda _: None))
        )
        for name, tensor in merged.items():
            torch.testing.assert_close(own[name], tensor)
            if name in changed:
                seen.add(name)
                assert not torch.allclose(base[name], tensor)
    assert seen == set(changed) and changed
