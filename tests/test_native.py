"""What is written in C is there where it can be: a compilation that failed would only be slow, and skip tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ts_parallel.native import HAS_KERNELS, ISA_VARIABLE, kernels
from ts_parallel.shared_memory import native

CPU_INFO = Path("/proc/cpuinfo")

pytestmark = pytest.mark.skipif(shutil.which("cc") is None or not CPU_INFO.exists(), reason="no compiler, or no Linux")


def test_ranks_of_one_host_can_share_memory() -> None:
    assert native is not None


def test_kernels_are_compiled_for_the_processors_that_they_are_written_for() -> None:
    assert kernels is not None
    assert kernels.is_supported() == ({"avx512_bf16", "avx512vbmi"} <= set(CPU_INFO.read_text().split()))
    assert HAS_KERNELS == (kernels.is_supported() and os.environ.get(ISA_VARIABLE) != "none")
