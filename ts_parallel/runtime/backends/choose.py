"""Which backend a rank computes with: asked once, answered in one line of its log. Nobody else asks what there is."""

from __future__ import annotations

import logging

import torch

from ts_parallel.errors import ConfigError
from ts_parallel.native import HAS_KERNELS, why_no_kernels
from ts_parallel.runtime.backends.base import Backend
from ts_parallel.runtime.backends.native.backend import NativeBackend
from ts_parallel.runtime.backends.torch.backend import TorchBackend

logger = logging.getLogger(__name__)


def choose_backend(
    device: torch.device, dtype: torch.dtype, num_threads: int | None = None, quantization: str | None = None
) -> Backend:
    """The fastest backend for weights of `dtype` on `device`.

    Args:
        num_threads: CPU threads that it may take; None: those that it has had.

    Raises:
        ConfigError: as `refuse_unquantizable`.
    """
    refuse_unquantizable(quantization, device, dtype)
    reason = _why_torch(device, dtype)
    backend: Backend = TorchBackend() if reason else NativeBackend()
    if num_threads is not None:
        backend.set_num_threads(num_threads)
    threads = f", {num_threads} threads" if num_threads is not None and device.type == "cpu" else ""
    why = f": {reason}" if reason else ""
    logger.info("ts_parallel computes %s on %s by the %s backend%s%s", _name(dtype), device, backend.name, threads, why)
    return backend


def refuse_unquantizable(quantization: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise where the weights cannot be kept as integers: only the kernels multiply by those.

    Raises:
        ConfigError: there are no kernels, or not for this device or dtype.
    """
    if quantization is None:
        return
    if device.type != "cpu":
        raise ConfigError(f"quantization {quantization} is for device cpu, not {device.type}: leave quantization out")
    if not HAS_KERNELS:
        raise ConfigError(
            f"quantization {quantization} needs the package's kernels, and {why_no_kernels()}: leave quantization out"
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"quantization {quantization} is of bfloat16 weights, not {_name(dtype)}: set dtype to bfloat16"
        )
    assert quantization in NativeBackend.quantizations, "config.py has let it through"


def _why_torch(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's own functions are the best that there is; None where the kernels are."""
    if device.type != "cpu":
        return "the kernels are for CPUs"
    if dtype != torch.bfloat16:
        return "the kernels are for bfloat16"
    return None if HAS_KERNELS else why_no_kernels()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
