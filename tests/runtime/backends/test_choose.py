"""One backend is chosen for a rank, its log says which and why, and what it could not do is refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from ts_parallel.errors import ConfigError
from ts_parallel.native import HAS_KERNELS, ISA_VARIABLE, VARIANT, VARIANTS, Variant, kernels_for, variant_for
from ts_parallel.runtime.backends import choose
from ts_parallel.runtime.backends.choose import (
    choose_backend,
    describe_choice,
    kernel_variants,
    own_dtype,
    refuse_unquantizable,
)

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(
    ("device", "dtype", "name", "why"),
    [
        (CPU, torch.float32, "torch", "the kernels are for bfloat16 and float16"),
        (META, torch.float16, "torch", "the kernels are for CPUs"),
        (META, torch.bfloat16, "torch", "the kernels are for CPUs"),
    ],
)
def test_log_says_which_backend_and_why(
    device: torch.device, dtype: torch.dtype, name: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert choose_backend(device, dtype).name == name
    (line,) = [record.message for record in caplog.records]
    kind = str(dtype).removeprefix("torch.")
    own = torch.backends.cpu.get_cpu_capability() if device == CPU else "META"
    assert line == f"ts_parallel computes {kind} on {device.type} by the {name} backend, {own}: {why}"


@pytest.mark.parametrize("device", [CPU, META])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_choice_is_told_without_being_made(device: torch.device, dtype: torch.dtype) -> None:
    choice = describe_choice(device, dtype)
    assert choice.backend == choose_backend(device, dtype).name
    assert choice.why
    if choice.backend == "native":
        own = VARIANT if dtype == torch.bfloat16 or VARIANT is None else VARIANT.float16
        assert own is not None and choice.instruction_set == own.label
    else:
        assert choice.instruction_set == (torch.backends.cpu.get_cpu_capability() if device == CPU else "META")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_computes_with_triton_where_it_is_installed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(choose, "find_spec", lambda name: object())
    assert describe_choice(gpu, dtype) == choose.Choice("cuda", "CUDA", "Triton is installed")
    assert describe_choice(gpu, torch.float64).backend == "torch"
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    without = describe_choice(gpu, dtype)
    assert without.backend == "torch" and without.why.startswith("Triton is not installed")


def test_variants_are_those_that_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bool(kernel_variants()) == HAS_KERNELS
    monkeypatch.setattr(choose, "VARIANT", None)
    assert kernel_variants() == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_without_kernels_is_computed_by_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "variant_for", lambda dtype: (None, "for float16 this processor lacks f16c"))
    assert describe_choice(CPU, dtype).backend == choose_backend(CPU, dtype).name == "torch"
    assert describe_choice(CPU, dtype).why == "for float16 this processor lacks f16c"


@pytest.fixture
def threads() -> Iterator[None]:
    """As many as before."""
    before = torch.get_num_threads()
    yield  # those of the kernels are put back by a fixture of all tests here
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_on_a_cpu_have_the_kernels_where_there_are_any(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backend, kernels, (variant, why) = choose_backend(CPU, dtype, 3), kernels_for(dtype), variant_for(dtype)
    assert backend.name == ("native" if kernels else "torch")
    own = variant.label if variant else torch.backends.cpu.get_cpu_capability()
    name = str(dtype).removeprefix("torch.")
    assert f"{name} on cpu by the {backend.name} backend, {own}, 3 threads: {why}" in caplog.text
    assert (kernels is not None) == (backend.weights is not None) == bool(backend.quantizations)
    if kernels:
        torch.set_num_threads(1)  # torch's alone: the kernels keep theirs
        assert kernels.get_num_threads() == 3


def test_variable_leaves_the_kernels_out() -> None:
    code = (
        "import torch, logging; logging.basicConfig(level=logging.INFO)\n"
        "from ts_parallel.runtime.backends.choose import choose_backend\n"
        "choose_backend(torch.device('cpu'), torch.bfloat16)"
    )
    environment = {**os.environ, ISA_VARIABLE: "none"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "bfloat16 on cpu by the torch backend, " in result.stderr
    assert f": {ISA_VARIABLE} is none" in result.stderr


def test_quantization_is_refused_where_nothing_multiplies_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="int8 is for device cpu, not meta: leave"):
        refuse_unquantizable("int8", META, torch.bfloat16)
    monkeypatch.setattr(choose, "VARIANT", VARIANTS[0])
    with pytest.raises(ConfigError, match="int4 is of bfloat16 or float16 weights, not float32: set dtype to bfloat16"):
        refuse_unquantizable("int4", CPU, torch.float32)
    monkeypatch.setattr(choose, "variant_for", lambda dtype: (None, "for float16 this processor lacks f16c"))
    with pytest.raises(ConfigError, match="and for float16 this processor lacks f16c: set dtype to bfloat16"):
        refuse_unquantizable("int4", CPU, torch.float16)
    monkeypatch.setattr(choose, "VARIANT", None)
    with pytest.raises(ConfigError, match=r"int8 needs the package's kernels, and .*: leave quantization out"):
        refuse_unquantizable("int8", CPU, torch.bfloat16)
    refuse_unquantizable(None, CPU, torch.bfloat16)


@pytest.mark.parametrize("variant", [None, VARIANTS[0]])
def test_dtype_that_is_left_open_is_float32_where_there_are_no_kernels(
    variant: Variant | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "VARIANT", variant)
    assert own_dtype("auto", "cpu") == ("auto" if variant else "float32")
    assert own_dtype("auto", "cuda") == "auto"
    assert own_dtype("bfloat16", "cpu") == "bfloat16"
