"""kernel_numbers.c, compiled for one instruction set as the build hook says, and run."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

NATIVE = ROOT / "ts_parallel" / "native"
SOURCE = Path(__file__).parent / "native" / "kernel_numbers.c"
FLAGS = ["-O1", "-std=gnu11", "-ffp-contract=off", "-pthread", f"-I{NATIVE}"]


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


def compile_program(compiler: str, options: list[str], folder: Path) -> Path:
    program = folder / "numbers"
    command = [compiler, *FLAGS, *options, str(SOURCE), "-o", str(program), "-lm"]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return program


def numbers_of(command: list[str], environment: dict[str, str] | None = None) -> list[list[str]]:
    """What the program prints, by line and word."""
    whole = {**os.environ, **(environment or {})}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=whole)
    assert result.returncode == 0, (result.returncode, result.stderr[-3000:])
    return [line.split() for line in result.stdout.splitlines()]
