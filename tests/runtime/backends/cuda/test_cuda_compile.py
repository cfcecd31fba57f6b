"""The Triton kernels compile for GPUs that are not here, and keep what they have in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = ROOT / "tests" / "compile_kernels.py"
OF_ATTENTION = {"attend_tiles", "attend_splits", "join_splits", "turn_and_write"}
SHARED_BYTES = {"80": 163 * 2**10, "90": 227 * 2**10}  # that a program may have there


@pytest.mark.parametrize(
    ("capability", "cases"), [("80", ["llama"]), ("90", ["llama", "gemma 2", "gpt-oss", "gemma 2 in float32"])]
)
def test_kernels_compile_and_those_in_16_bits_spill_next_to_nothing(
    capability: str, cases: list[str], tmp_path: Path
) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(PROGRAM), capability, *cases]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-4000:]
    lines: list[dict[str, Any]] = [json.loads(line) for line in found.stdout.splitlines()]
    assert {(line["case"], line["kernel"]) for line in lines} == {
        (case, name) for case in cases for name in OF_ATTENTION
    }
    for line in lines:
        assert line["shared"] <= SHARED_BYTES[capability], line
        assert line["spilled"] <= 64 or "float32" in line["case"], line
