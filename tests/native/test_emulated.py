"""The kernels for another architecture's processors, number by number beside those of plain C, under an emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

NATIVE = ROOT / "ts_parallel" / "native"
SOURCE = Path(__file__).parent / "kernel_numbers.c"
FLAGS = ["-O1", "-std=gnu11", "-ffp-contract=off", "-pthread", f"-I{NATIVE}"]
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"  # of Debian's gcc-aarch64-linux-gnu and qemu-user
# Two numbers next to each other, of those that are not small.
LARGEST_ERROR, SMALL = {"bfloat16": 2**-6, "float16": 2**-9}, 0.05


def load_build_hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file that compiles at the install, which is made for an environment with hatchling."""
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = list  # type: ignore[attr-defined] # anything that takes a parameter
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = spec_from_file_location("hatch_build", NATIVE / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers_of(compiler: str, options: list[str], folder: Path, *emulator: str) -> list[list[str]]:
    program = folder / "numbers"
    command = [compiler, *FLAGS, *options, str(SOURCE), "-o", str(program), "-lm"]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    result = subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True, timeout=200)
    return [line.split() for line in result.stdout.splitlines()]


@pytest.mark.skipif(platform.machine() == "aarch64", reason="it needs no emulator here: see test_variants.py")
@pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"no {COMPILER} or {EMULATOR}")
@pytest.mark.parametrize("name", ["neon", "neon_bf16", "neon_float16"])
def test_kernels_for_arm_give_the_numbers_of_plain_c(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = load_build_hook(monkeypatch).kernel_modules("aarch64")
    numbers = "float16" if name.endswith("float16") else "bfloat16"
    plain_name = "plain_float16" if numbers == "float16" else "plain"
    found = numbers_of(COMPILER, ["-static", *modules[f"kernels_{name}"]], tmp_path, EMULATOR, "-cpu", "max")
    expected = numbers_of("cc", modules[f"kernels_{plain_name}"], tmp_path)
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    assert {line[0] for line in expected} == {"rows", "linear", "norm", "rotary", "argmax", "attention"}
    for own, plain in zip(found, expected, strict=True):
        assert len(own) == len(plain) > 2
        for number, wanted in zip(map(float, own[2:]), map(float, plain[2:]), strict=True):
            assert abs(number - wanted) <= LARGEST_ERROR[numbers] * (abs(wanted) + SMALL), own[:2]
