"""The kernels of every instruction set that this processor has, and those of plain C, are right number by number: what
is said of the ones in force holds for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ts_parallel.native import ISA_VARIABLE, VARIANT, VARIANTS, may_use_tiles, processor_flags

HERE = Path(__file__).parent
OF_KERNELS = [
    HERE / f"test_{name}.py" for name in ("coded_weights", "linears", "norms", "paged_attention", "quantized")
]
OTHERS = [each.name for each in VARIANTS if each.is_compiled and each.needs <= processor_flags() and each != VARIANT]


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "amx" or may_use_tiles()])
def test_kernels_of_another_instruction_set_pass_the_same_tests(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not ranks"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    result = subprocess.run(
        [*command, *map(str, OF_KERNELS)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**environment, ISA_VARIABLE: name, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout
