"""Which backend a rank computes with: asked once, answered in one line of its log. Nobody else asks what there is."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from ts_parallel.errors import ConfigError
from ts_parallel.native import CANNOT_BE_HAD, VARIANT, WHY, Variant, usable_variants, variant_for
from ts_parallel.runtime.backends.base import Backend
from ts_parallel.runtime.backends.native.backend import NativeBackend
from ts_parallel.runtime.backends.torch.backend import TorchBackend

logger = logging.getLogger(__name__)

_CUDA = "cuda"
_OF_TRITON = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    """Who computes one dtype on one device, by which instructions."""

    backend: str
    """`Backend.name`."""
    instruction_set: str
    """The variant of the kernels; of torch's own functions, as torch calls it."""
    why: str
    """Why it is this variant of the kernels, or why it is not the kernels: half a sentence."""


def describe_choice(device: torch.device, dtype: torch.dtype) -> Choice:
    """What `choose_backend` takes for weights of `dtype` on `device`, and why.

    Raises:
        ConfigError: a variant of the kernels was asked for that cannot run here.
    """
    variant, why = _choose_variant(device, dtype)
    if variant is not None:
        return Choice(NativeBackend.name, variant.label, why)
    if device.type == "cuda" and torch.version.hip is None and dtype in _OF_TRITON:
        if find_spec("triton") is not None:
            return Choice(_CUDA, "CUDA", "Triton is installed")
        why = "Triton is not installed, and without it every operation is a launch of its own"
    of_torch = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type.upper()
    return Choice(TorchBackend.name, of_torch, why)


def kernel_variants() -> tuple[str, ...]:
    """The variants of the kernels that can run here, first the one that does; none where there are no kernels."""
    others = [variant.label for variant in usable_variants() if variant != VARIANT]
    return () if VARIANT is None else (VARIANT.label, *others)


def choose_backend(
    device: torch.device, dtype: torch.dtype, num_threads: int | None = None, quantization: str | None = None
) -> Backend:
    """The fastest backend for weights of `dtype` on `device`.

    Args:
        num_threads: CPU threads that it may take; None: those that it has had.

    Raises:
        ConfigError: as `refuse_unquantizable`, or a variant of the kernels was asked for that cannot run here.
    """
    refuse_unquantizable(quantization, device, dtype)
    choice = describe_choice(device, dtype)
    backend = _make_backend(choice.backend)
    if num_threads is not None:
        backend.set_num_threads(num_threads)
    threads = f", {num_threads} threads" if num_threads is not None and device.type == "cpu" else ""
    logger.info(
        "ts_parallel computes %s on %s by the %s backend, %s%s: %s",
        *(_name(dtype), device, backend.name, choice.instruction_set, threads, choice.why),
    )
    return backend


def _make_backend(name: str) -> Backend:
    if name == _CUDA:
        from ts_parallel.runtime.backends.cuda.backend import CudaBackend  # and with it Triton, which others lack

        return CudaBackend()
    return NativeBackend() if name == NativeBackend.name else TorchBackend()


def own_dtype(dtype: str, device: str) -> str:
    """What the setting `dtype` means on `device`: `auto` is float32 on a CPU for which there are no kernels, for torch
    multiplies float32 there many times as fast as bfloat16, and rounds less; else it is the checkpoint's."""
    is_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return "float32" if dtype == "auto" and is_cpu and VARIANT is None else dtype


def refuse_unquantizable(quantization: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise where the weights cannot be kept as integers: only the kernels multiply by those.

    Raises:
        ConfigError: there are no kernels, or not for this device or dtype.
    """
    if quantization is None:
        return
    if device.type != "cpu":
        raise ConfigError(f"quantization {quantization} is for device cpu, not {device.type}: leave quantization out")
    if VARIANT is None:
        raise ConfigError(f"quantization {quantization} needs the package's kernels, and {WHY}: leave quantization out")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"quantization {quantization} is of bfloat16 or float16 weights, not {_name(dtype)}: set dtype to bfloat16"
        )
    variant, why = variant_for(dtype)
    if variant is None:
        raise ConfigError(f"quantization {quantization} needs the package's kernels, and {why}: set dtype to bfloat16")
    assert quantization in NativeBackend.quantizations, "config.py has let it through"


def _choose_variant(device: torch.device, dtype: torch.dtype) -> tuple[Variant | None, str]:
    """The variant of the kernels, if they are the best that there is, and why it is this one, or none.

    Raises:
        ConfigError: a variant of the kernels was asked for that cannot run here.
    """
    if device.type != "cpu":
        return None, "the kernels are for CPUs"
    if CANNOT_BE_HAD:
        raise ConfigError(WHY)
    return variant_for(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
