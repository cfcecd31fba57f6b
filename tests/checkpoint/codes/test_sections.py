"""What is said of quantised weights, beside the tensors that are there: each contradiction is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_table import REFUSED
from quantised_checkpoints import KINDS, pack_words, write
from safetensors.torch import load_file, save_file

from ts_parallel.checkpoint.conversion.convert import convert
from ts_parallel.checkpoint.conversion.write_safetensors import Safetensors
from ts_parallel.checkpoint.index import read_index
from ts_parallel.checkpoint.load import LoadItem, load_tensors
from ts_parallel.checkpoint.progress import Progress
from ts_parallel.checkpoint.quantized import refuse_quantized
from ts_parallel.errors import CheckpointError

SILENT = Progress("", is_shown=False)


@pytest.mark.parametrize("kind", REFUSED)
def test_kind_that_is_not_read_is_refused_on_one_line_that_names_it(kind: str, tmp_path: Path) -> None:
    writer, says = REFUSED[kind]
    writer(tmp_path / "own", tmp_path / "plain")
    with pytest.raises(CheckpointError) as refusal:
        refuse_quantized(tmp_path / "own")
        read_index(tmp_path / "own")
    line = str(refusal.value)
    assert says in line and "\n" not in line and str(tmp_path / "own") in line, line


def change_section(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("FP8, blocks", {"weight_block_size": [128]}, r"has weight_block_size \[128\], not two numbers"),
        (
            "FP8, blocks",
            {"smooth": 0.5},
            "config.json: quantization_config has 'smooth', and what it does to the weights",
        ),
        (
            "GPTQ, 4 bits, act-order",
            {"checkpoint_format": "marlin"},
            "has checkpoint_format 'marlin', which is not read",
        ),
        ("GPTQ, 4 bits, act-order", {"bits": 8}, r"qzeros' in .* has shape .* does not fit"),
        ("AWQ", {"bits": 8}, "has bits 8, which is not read"),
        ("MXFP4 (gpt-oss)", {"rotation": "hadamard"}, "has 'rotation', and what it does"),
        ("bitsandbytes, int8", {"outliers": [1]}, "has 'outliers', and what it does"),
    ],
)
def test_setting_that_is_not_understood_is_refused_by_its_name(
    kind: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write(tmp_path / "own", tmp_path / "plain", KINDS[kind])
    change_section(tmp_path / "own", **changes)
    with pytest.raises(CheckpointError, match=says):
        read_index(tmp_path / "own")


def test_two_files_that_say_different_things_are_both_named(tmp_path: Path) -> None:
    write(tmp_path / "own", tmp_path / "plain", KINDS["GPTQ, 4 bits, act-order"])
    (tmp_path / "own" / "quantize_config.json").write_text(json.dumps({"bits": 4, "desc_act": True}))
    assert read_index(tmp_path / "own")
    (tmp_path / "own" / "quantize_config.json").write_text(json.dumps({"bits": 8, "desc_act": True}))
    with pytest.raises(CheckpointError, match=r"config\.json says .* bits 4, but .*quantize_config\.json says bits 8"):
        read_index(tmp_path / "own")


@pytest.mark.parametrize(
    ("kind", "end", "change"),
    [
        ("FP8, blocks", "_scale_inv", lambda scales: scales[:-1]),
        ("FP8, rows (compressed-tensors)", ".weight_scale", lambda scales: scales.int()),
        ("int4, groups (compressed-tensors)", ".weight_packed", lambda words: words[:, :-1]),
        ("GPTQ, 4 bits, act-order", ".g_idx", lambda groups: groups[:-1]),
        ("AWQ", ".scales", lambda scales: scales[:, :-8]),
        ("bitsandbytes, nf4, quantised twice", ".absmax", lambda largest: largest[:-1]),
        ("bitsandbytes, fp4", "__fp4", lambda state: state[:-1]),
        ("MXFP4 (gpt-oss)", "_scales", lambda scales: scales[..., :-1]),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_named(kind: str, end: str, change: Any, tmp_path: Path) -> None:
    write(tmp_path / "own", tmp_path / "plain", KINDS[kind])
    file = tmp_path / "own" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(end))
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file)
    stem = name.removesuffix(end).rpartition(".weight")[0] or name.removesuffix(end)
    with pytest.raises(CheckpointError, match=rf"'{stem.rpartition('.')[0]}.*model\.safetensors"):
        read_index(tmp_path / "own")


def test_group_that_no_scales_are_for_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "own", tmp_path / "plain", KINDS["GPTQ, 4 bits, act-order"])
    file = tmp_path / "own" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".g_idx"))
    save_file({**tensors, name: tensors[name] + 1}, file)
    stored = read_index(tmp_path / "own")[name.replace("g_idx", "weight")]
    with pytest.raises(CheckpointError, match=r"g_idx' in .* names groups from 1 to (\d+), .*scales' has \1"):
        load_tensors([LoadItem(torch.empty(stored.shape), stored, None)], SILENT)


def test_first_format_of_gptq_carries_over_as_its_own_conversion_does(tmp_path: Path) -> None:
    """A stored zero point of fifteen becomes nought, and the next one gets one more: `convert_gptq_v1_to_v2_format`."""
    zeros = torch.tensor([[14, 15, 3, 0, 15, 15, 7, 7]])
    tensors = {
        "x.qweight": pack_words(torch.zeros(8, 8), 4, 0),
        "x.qzeros": pack_words(zeros, 4, 1),
        "x.scales": torch.ones(1, 8, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    stored = read_index(tmp_path)["x.weight"]
    found = torch.empty(stored.shape)
    load_tensors([LoadItem(found, stored, None)], SILENT)
    words = tensors["x.qzeros"] + 0x11111111
    assert torch.equal(-found[:, 0], torch.tensor([float(int(words[0, 0]) >> 4 * place & 15) for place in range(8)]))


@pytest.mark.parametrize("kind", ["FP8, blocks", "FP8, tensors (ModelOpt)", "GPTQ, 8 bits", "MXFP4 (gpt-oss)"])
def test_converted_checkpoint_is_plain_and_says_so(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "own", tmp_path / "plain", KINDS[kind])
    (tmp_path / "own" / "recipe.yaml").write_text("QuantizationModifier:\n")
    convert(tmp_path / "own", tmp_path / "new", Safetensors(), compare=True)
    found, plain = (
        load_file(tmp_path / "new" / "model.safetensors"),
        load_file(tmp_path / "plain" / "model.safetensors"),
    )
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, plain[name].bfloat16()), name
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"config.json", "model.safetensors"}
    assert "quantization_config" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert not any(stored.codes for stored in read_index(tmp_path / "new").values())
