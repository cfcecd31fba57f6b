"""The kernels for another architecture's processors, number by number beside those of plain C, under an emulator."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest
from kernel_program import compile_program, load_build_hook, numbers_of

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"  # of Debian's gcc-aarch64-linux-gnu and qemu-user
# Two numbers next to each other, of those that are not small.
LARGEST_ERROR, SMALL = {"bfloat16": 2**-6, "float16": 2**-9}, 0.05


@pytest.mark.skipif(platform.machine() == "aarch64", reason="it needs no emulator here: see test_variants.py")
@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"no {COMPILER} or {EMULATOR}")
@pytest.mark.parametrize("name", ["neon", "neon_bf16", "neon_float16"])
def test_kernels_for_arm_give_the_numbers_of_plain_c(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = load_build_hook(monkeypatch).kernel_modules("aarch64")
    numbers = "float16" if name.endswith("float16") else "bfloat16"
    plain_name = "plain_float16" if numbers == "float16" else "plain"
    program = compile_program(COMPILER, ["-static", *modules[f"kernels_{name}"]], tmp_path)
    found = numbers_of([EMULATOR, "-cpu", "max", str(program)])
    expected = numbers_of([str(compile_program("cc", modules[f"kernels_{plain_name}"], tmp_path))])
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    assert {line[0] for line in expected} == {"rows", "linear", "norm", "rotary", "argmax", "attention"}
    for own, plain in zip(found, expected, strict=True):
        assert len(own) == len(plain) > 2
        for number, wanted in zip(map(float, own[2:]), map(float, plain[2:]), strict=True):
            assert abs(number - wanted) <= LARGEST_ERROR[numbers] * (abs(wanted) + SMALL), own[:2]
