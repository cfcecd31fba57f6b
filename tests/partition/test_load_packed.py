"""Weights that are packed while they are read hold the numbers that the plain ones do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, random_model, tiny
from quantised_checkpoints import KINDS, write
from safetensors.torch import load_file, save_file

from ts_parallel.checkpoint import load
from ts_parallel.checkpoint.index import SINGLE_FILE, read_index
from ts_parallel.checkpoint.load import LoadItem
from ts_parallel.errors import CheckpointError
from ts_parallel.native import HAS_KERNELS
from ts_parallel.native.packed_weight import PackedWeight
from ts_parallel.partition import load as loading
from ts_parallel.partition.build import make_programs
from ts_parallel.partition.load import load_program
from ts_parallel.partition.program import ProgramRequest, RankProgram
from ts_parallel.runtime.backends.native.backend import NativeBackend
from ts_parallel.topology import TensorParallelGroup

pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="this processor does not run the kernels")
CPU = torch.device("cpu")


def save(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> None:
    random_model(FAMILIES[family]()).to(dtype).save_pretrained(folder)


def programs(folder: Path, dtype: str = "bfloat16") -> dict[int, RankProgram]:
    made = make_programs(ProgramRequest(folder, dtype, 0, 2), read_index(folder))
    return {rank: program for (rank, _), program in made.items()}


def tensors(
    program: RankProgram, folder: Path, rank: int, packs: bool, merge: Any = None, quantization: str | None = None
) -> dict[str, Any]:
    group = TensorParallelGroup(rank, 2)
    return load_program(
        program, read_index(folder), group, CPU, NativeBackend.weights if packs else None, merge, quantization
    ).tensors


def unpacked(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: own.unpack() if isinstance(own, PackedWeight) else own for name, own in found.items()}


def note_whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for every weight from now on that is packed after it was read whole."""
    noted: list[int] = []
    pack = loading._pack
    monkeypatch.setattr(loading, "_pack", lambda *own: noted.append(1) or pack(*own))  # type: ignore[func-returns-value]
    return noted


@pytest.mark.parametrize(
    ("family", "stored", "dtype"),
    [
        *((family, stored, "bfloat16") for family in ("llama", "phi3") for stored in (torch.bfloat16, torch.float32)),
        ("llama", torch.float16, "float16"),
        ("phi3", torch.bfloat16, "float16"),
    ],
)
def test_packed_weights_hold_what_plain_ones_do(
    family: str, stored: torch.dtype, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, family, stored)
    monkeypatch.setattr(load, "STAGING_BYTES", 1000)
    num_packed = 0
    for rank, program in programs(tmp_path, dtype).items():
        plain = tensors(program, tmp_path, rank, packs=False)
        packed = tensors(program, tmp_path, rank, packs=True)
        num_packed += sum(isinstance(own, PackedWeight) for own in packed.values())
        assert not any(isinstance(own, PackedWeight) for own in plain.values())
        assert packed.keys() == plain.keys()
        assert all(torch.equal(own, plain[name]) for name, own in unpacked(packed).items())
    assert num_packed


def test_weight_that_is_merged_is_packed_after_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "llama")
    noted = note_whole(monkeypatch)

    def merge(item: LoadItem) -> None:
        item.target.detach().add_(1)

    program = programs(tmp_path)[1]
    plain = tensors(program, tmp_path, 1, packs=False)
    assert not noted
    packed = tensors(program, tmp_path, 1, packs=True, merge=merge)
    assert noted and sum(isinstance(own, PackedWeight) for own in packed.values()) == len(noted)
    for name in program.plan.parameters:
        assert torch.equal(unpacked(packed)[name], plain[name] + 1)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_weights_of_a_plain_model_are_never_read_whole(
    quantization: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "llama")
    noted = note_whole(monkeypatch)
    packed = tensors(programs(tmp_path)[0], tmp_path, 0, packs=True, quantization=quantization)
    assert any(isinstance(own, PackedWeight) for own in packed.values()) and not noted


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_each_rank_quantizes_what_it_keeps_while_it_reads(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head at 8 bits; what is merged first is quantized after it."""
    save(tmp_path, "llama")
    monkeypatch.setattr(load, "STAGING_BYTES", 1000)
    for rank, program in programs(tmp_path).items():
        plain = tensors(program, tmp_path, rank, packs=True)
        made = tensors(program, tmp_path, rank, packs=True, quantization=quantization)
        merged = tensors(program, tmp_path, rank, packs=True, merge=lambda item: None, quantization=quantization)
        for name, own in plain.items():
            if isinstance(own, PackedWeight):
                expected = PackedWeight.allocate(own.shape, "int8" if name == "lm_head.weight" else quantization)
                expected.put(0, own.unpack())
                assert made[name].quantization == merged[name].quantization == expected.quantization
                assert torch.equal(made[name].unpack(), expected.unpack())
                assert torch.equal(merged[name].unpack(), expected.unpack())
            else:
                assert torch.equal(made[name], own)


def test_nan_in_a_weight_that_is_packed_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    made = programs(tmp_path)
    stored = load_file(tmp_path / SINGLE_FILE)
    name = next(name for name in stored if "down_proj" in name)
    stored[name][-1, -1] = math.nan
    save_file(stored, tmp_path / SINGLE_FILE)
    tensors(made[0], tmp_path, 0, packs=True)  # the last column is the other rank's
    with pytest.raises(CheckpointError, match=f"'{name}' in .* holds NaN$"):
        tensors(made[1], tmp_path, 1, packs=True)


@pytest.mark.parametrize(("quantization", "again"), [(None, ""), ("int4", " and made int4 anew")])
def test_log_says_what_becomes_of_a_quantised_checkpoint(
    quantization: str | None, again: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "own", tmp_path / "plain", KINDS["int8, rows (compressed-tensors)"])
    made = {name: programs(tmp_path / name) for name in ("own", "plain")}
    caplog.set_level("INFO", "ts_parallel.partition.load")
    for rank in (0, 1):
        tensors(made["own"][rank], tmp_path / "own", rank, packs=True, quantization=quantization)
    (line,) = [record.getMessage() for record in caplog.records if record.name == loading.__name__]
    assert line.startswith(
        f"weights stored as int8 with scales (compressed-tensors) are computed as they are read{again}"
    )
    assert line.endswith("; activations keep theirs")
    caplog.clear()
    tensors(made["plain"][0], tmp_path / "plain", 0, packs=True, quantization=quantization)
    assert [record for record in caplog.records if record.name == loading.__name__] == []


@pytest.mark.parametrize("kind", ["FP8, blocks, the last ones smaller", "GPTQ, 4 bits, act-order"])
def test_panels_of_codes_hold_the_plain_weights(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of which a panel has rows of several blocks, and a rank a part of a group."""
    write(tmp_path / "own", tmp_path / "plain", KINDS[kind])
    noted = note_whole(monkeypatch)
    for rank, program in programs(tmp_path / "own").items():
        packed = tensors(program, tmp_path / "own", rank, packs=True)
        assert any(isinstance(own, PackedWeight) for own in packed.values()) and not noted
        expected = tensors(programs(tmp_path / "plain")[rank], tmp_path / "plain", rank, packs=False)
        for name, weight in unpacked(packed).items():
            assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(
    ("kind", "quantization", "dtype"),
    [
        ("int8, rows (compressed-tensors)", "int8", "bfloat16"),
        ("int8, rows, packed (compressed-tensors)", "int8", "bfloat16"),
        ("int4, groups (compressed-tensors)", "int4", "bfloat16"),
        ("int4, groups (compressed-tensors)", "int8", "bfloat16"),
        ("GPTQ, 4 bits", "int4", "float16"),
        ("AWQ, no zero points", "int4", "float16"),
    ],
)
def test_integers_of_a_checkpoint_stay_what_they_are(
    kind: str, quantization: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the dtype of its scales: then what they stand for is the weight as it is computed, number by number."""
    write(tmp_path / "own", tmp_path / "plain", KINDS[kind], getattr(torch, dtype))
    caplog.set_level("INFO", "ts_parallel.partition.load")
    made = programs(tmp_path / "own", dtype)
    anew = []
    for rank, program in made.items():
        computed = tensors(program, tmp_path / "own", rank, packs=True)
        kept = unpacked(tensors(program, tmp_path / "own", rank, packs=True, quantization=quantization))
        coded = [name for name, own in read_index(tmp_path / "own").items() if own.codes]
        anew += [(rank, name) for name in coded if not torch.equal(kept[name], unpacked(computed)[name])]
    if "groups" in kind or quantization == "int4":  # the second rank's columns begin within a group
        assert {(rank, name.split(".")[-2]) for rank, name in anew} == {(1, "down_proj")}
    else:
        assert not anew
    line = next(record.getMessage() for record in caplog.records if "stay the integers" in record.getMessage())
    assert line.startswith("14 weights stored as ") and line.endswith(
        f" stay the integers that they are as {quantization}; activations keep theirs"
    )


def test_scales_of_another_dtype_are_rounded_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "own", tmp_path / "plain", KINDS["GPTQ, 4 bits"], torch.float16)
    caplog.set_level("INFO", "ts_parallel.partition.load")
    program = programs(tmp_path / "own")[0]
    kept = unpacked(tensors(program, tmp_path / "own", 0, packs=True, quantization="int4"))
    exact = tensors(programs(tmp_path / "plain", "float32")[0], tmp_path / "plain", 0, packs=False)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(kept[name].float(), exact[name], rtol=2**-7, atol=0)
    assert "their scales of float16 rounded to bfloat16" in caplog.text


def test_panel_with_a_scale_that_the_running_dtype_lacks_is_made_anew_alone(tmp_path: Path) -> None:
    kind = replace(KINDS["int8, rows (compressed-tensors)"], config=tiny("llama", intermediate_size=512))
    write(tmp_path / "own", tmp_path / "plain", kind)
    stored = load_file(tmp_path / "own" / SINGLE_FILE)
    name = "model.layers.1.mlp.up_proj.weight"
    stored[f"{name}_scale"][70] = 1e-7  # float16 has one bit left there
    save_file(stored, tmp_path / "own" / SINGLE_FILE)
    program = programs(tmp_path / "own", "float16")[0]
    computed = tensors(program, tmp_path / "own", 0, packs=True)[name].unpack()
    kept = tensors(program, tmp_path / "own", 0, packs=True, quantization="int8")[name].unpack()
    exact = load_file(tmp_path / "plain" / SINGLE_FILE)[name][:256]
    anew = PackedWeight.allocate((256, 64), "int8", torch.float16)
    anew.put(0, computed)
    for panel, own in enumerate(kept.split(64)):
        if panel == 1:
            assert torch.equal(own, anew.unpack()[64:128])
        else:
            torch.testing.assert_close(own.float(), exact[64 * panel :][:64], rtol=2**-7, atol=0)
    assert not torch.equal(kept, anew.unpack())


@pytest.mark.parametrize("kind", ["GPTQ, 4 bits, act-order", "GPTQ, 4 bits, zero points", "AWQ", "GPTQ, 8 bits"])
def test_integers_that_are_none_of_the_kernels_are_made_anew(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "own", tmp_path / "plain", KINDS[kind], torch.float16)
    caplog.set_level("INFO", "ts_parallel.partition.load")
    program = programs(tmp_path / "own", "float16")[0]
    computed = tensors(program, tmp_path / "own", 0, packs=True)
    made = tensors(program, tmp_path / "own", 0, packs=True, quantization="int4")
    for name, own in made.items():
        if isinstance(own, PackedWeight) and own.quantization == "int4":
            expected = PackedWeight.allocate(own.shape, "int4", torch.float16)
            expected.put(0, computed[name].unpack())
            assert torch.equal(own.unpack(), expected.unpack())
    assert "made int4 anew" in caplog.text and "stay the integers" not in caplog.text
