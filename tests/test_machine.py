"""What a machine says of itself is read, also where it says little."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from ts_parallel.machine import Machine, core_quota, is_loopback, this_machine

X86 = """\
processor\t: 0
model name\t: AMD EPYC 9R14
flags\t\t: fpu avx2 avx512f avx512_bf16 avx512vbmi

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd40\n\n"
NUM_CORES = len(os.sched_getaffinity(0))


def test_processor_is_the_first_one_with_the_instruction_sets_that_matter(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text(X86)
    names = ("AVX2", "AVX-512", "AVX512-VBMI", "AVX512-BF16")
    assert this_machine(tmp_path / "x86") == Machine("AMD EPYC 9R14", NUM_CORES, names)
    (tmp_path / "arm").write_text(ARM)
    arm = this_machine(tmp_path / "arm")
    assert arm.instruction_sets == ("NEON", "BF16")
    assert platform.machine() in arm.processor
    assert this_machine(tmp_path / "none").instruction_sets == ()


def test_this_machine_has_a_name_and_cores() -> None:
    machine = this_machine()
    assert machine.processor and machine.num_cores >= 1


@pytest.mark.parametrize(
    ("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None), (None, None)]
)
def test_quota_of_a_container_is_cores(text: str | None, cores: float | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert core_quota(tmp_path / "cpu.max") == cores


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("example.org", False),
    ],
)
def test_loopback_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
