"""The kernels of this machine's instruction sets touch their own memory alone, as the compiler's sanitizers see it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from kernel_program import compile_program, load_build_hook, numbers_of

from ts_parallel.native import usable_variants

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
OWN = [each.name for variant in usable_variants()[:1] for each in (variant, variant.float16) if each is not None]


def has_sanitizers() -> bool:
    if not shutil.which("cc"):
        return False
    command = ["cc", *SANITIZERS, "-x", "c", "-", "-o", "/dev/null"]
    return subprocess.run(command, input=b"int main(void) { return 0; }", capture_output=True).returncode == 0


@pytest.mark.skipif(not has_sanitizers(), reason="the compiler has no sanitizers")
@pytest.mark.parametrize("name", OWN)
def test_kernels_touch_their_own_memory_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = load_build_hook(monkeypatch).kernel_modules(platform.machine())[f"kernels_{name}"]
    program = compile_program("cc", [*SANITIZERS, *options], tmp_path)
    lines = numbers_of([str(program)], {"ASAN_OPTIONS": "detect_leaks=0"})  # it frees nothing
    assert {line[0] for line in lines} == {"rows", "linear", "norm", "rotary", "argmax", "attention"}
