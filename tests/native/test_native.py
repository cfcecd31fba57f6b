"""What is written in C is there where it can be: a compilation that failed would only be slow, and skip tests."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ts_parallel.native import (
    ISA_VARIABLE,
    VARIANT,
    VARIANTS,
    WHY,
    choose_variant,
    float16_beside,
    kernels_for,
    may_use_tiles,
    processor_flags,
    usable_variants,
    variant_for,
)
from ts_parallel.shared_memory import native

CPU_INFO = Path("/proc/cpuinfo")
OF_MACHINES = {
    "x86_64": {"amx", "avx512_bf16", "avx512", "avx2", "plain"},
    "aarch64": {"neon_bf16", "neon", "plain"},
}
ZEN_2 = {"avx2", "fma", "f16c", "sse4_2"}
SKYLAKE_SP = ZEN_2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
ZEN_4 = SKYLAKE_SP | {"avx512_bf16", "avx512vbmi"}
SAPPHIRE_RAPIDS = ZEN_4 | {"amx_tile", "amx_bf16", "amx_int8"}

pytestmark = pytest.mark.skipif(shutil.which("cc") is None or not CPU_INFO.exists(), reason="no compiler, or no Linux")


def test_ranks_of_one_host_can_share_memory() -> None:
    assert native is not None


def test_all_variants_of_this_machine_are_compiled() -> None:
    compiled = {variant.name for variant in VARIANTS if variant.is_compiled}
    assert compiled == OF_MACHINES.get(platform.machine(), {"plain"})
    assert all(variant.float16 and variant.float16.is_compiled for variant in VARIANTS if variant.is_compiled)


def test_the_best_variant_that_the_processor_has_is_taken() -> None:
    wanted, usable = os.environ.get(ISA_VARIABLE, ""), usable_variants()
    if wanted:
        assert (VARIANT, WHY) == choose_variant(wanted, processor_flags())
    else:
        assert (usable[0] if usable else None) == VARIANT


@pytest.mark.skipif(not may_use_tiles(), reason="no tiles")
def test_process_that_may_not_use_tiles_has_the_next_variant() -> None:
    """As in a container with a filter of system calls: an alternate signal stack that is too small for the tiles is
    another reason for Linux to say no."""
    code = (
        "import ctypes\n"
        "stack = ctypes.create_string_buffer(4096)\n"
        "settings = (ctypes.c_size_t * 3)(ctypes.addressof(stack), 0, len(stack))\n"
        "assert ctypes.CDLL(None).sigaltstack(settings, None) == 0\n"
        "from ts_parallel.native import VARIANT, WHY, usable_variants\n"
        "print(VARIANT.name, [each.name for each in usable_variants()], WHY)"
    )
    environment = {key: value for key, value in os.environ.items() if key != ISA_VARIABLE}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout == (
        "avx512_bf16 ['avx512_bf16', 'avx512', 'avx2'] the best of what this processor has, "
        "as the system gives this process no tiles\n"
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are compiled on x86-64")
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (ZEN_2, "avx2"),
        (SKYLAKE_SP, "avx512"),
        (ZEN_4, "avx512_bf16"),
        (SAPPHIRE_RAPIDS, "amx"),
        ({"sse4_2"}, None),
    ],
)
def test_each_processor_has_its_variant(flags: set[str], name: str | None) -> None:
    variant, why = choose_variant("", flags)
    assert (variant.name if variant else None) == name
    assert why == (
        "the best of what this processor has" if name else "this processor has neither AVX2 with FMA nor NEON"
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are compiled on x86-64")
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (ZEN_2, "avx2_float16"),
        (SKYLAKE_SP, "avx512_float16"),
        (ZEN_4, "avx512_float16"),
        (ZEN_2 - {"f16c"}, None),
        ({"sse4_2"}, None),
    ],
)
def test_float16_has_the_kernels_that_multiply_float32(flags: set[str], name: str | None) -> None:
    variant, why = float16_beside(*choose_variant("", flags), flags)
    assert (variant.name if variant else None) == name
    assert why == {
        None: "for float16 this processor lacks f16c" if "avx2" in flags else choose_variant("", flags)[1]
    }.get(name, "the best of what this processor has")


def test_each_dtype_of_16_bits_has_kernels_of_its_own_and_no_other_has_any() -> None:
    assert variant_for(torch.bfloat16) == (VARIANT, WHY)
    assert variant_for(torch.float16) == float16_beside(VARIANT, WHY, processor_flags())
    assert variant_for(torch.float32) == (None, "the kernels are for bfloat16 and float16")
    own = [kernels_for(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
    assert [kernels is not None for kernels in own] == [
        VARIANT is not None,
        variant_for(torch.float16)[0] is not None,
        False,
        False,
    ]
    assert own[0] is None or own[0] is not own[1]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("none", "TS_PARALLEL_ISA is none"),
        (
            "sse9",
            "TS_PARALLEL_ISA is 'sse9', not none or one of amx, avx512_bf16, avx512, avx2, neon_bf16, neon, plain",
        ),
        ("avx512", "TS_PARALLEL_ISA is avx512, and this processor lacks avx512bw, avx512dq, avx512f, avx512vl"),
    ],
)
def test_variant_that_cannot_be_is_none_and_says_why(wanted: str, says: str) -> None:
    assert choose_variant(wanted, ZEN_2) == (None, says)


def test_variant_that_was_asked_for_and_cannot_run_stops_the_start() -> None:
    code = (
        "import torch\n"
        "from ts_parallel.runtime.backends.choose import choose_backend\n"
        "choose_backend(torch.device('cpu'), torch.bfloat16)"
    )
    environment = {**os.environ, ISA_VARIABLE: "sse9"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        "ts_parallel.errors.ConfigError: TS_PARALLEL_ISA is 'sse9', not none"
    )
