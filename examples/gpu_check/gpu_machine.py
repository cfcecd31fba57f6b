"""The card, the libraries, and what both can do at best: copies, products, launches."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import torch
from gpu_models import device_of
from gpu_report import Found, Report


def seconds_of(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Of one run, in the mean of `times`, after one more."""
    run()
    wait_for(device)
    started = time.perf_counter()
    for _ in range(times):
        run()
    wait_for(device)
    return (time.perf_counter() - started) / times


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, size: str) -> float:
    """GB/s, read and written."""
    source = torch.empty(2**32 if size == "whole" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), 10, device) / 1e9


def check(report: Report, size: str) -> None:
    device = device_of(size)
    report.check("card and versions", lambda: _versions(device))
    report.check("copy, GB/s read and written", lambda: {"gb_per_s": copy_bandwidth(device, size)})
    report.check("product of two square bfloat16 matrices", lambda: _product(device, size))
    report.check("reading of a matrix by one vector", lambda: _matrix_vector(device, size))
    report.check("launch of one small operation", lambda: _launch(device))
    report.check("imports from a bare checkout", _imports)


def _versions(device: torch.device) -> Found:
    found = {"date": str(date.today()), "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "triton", "vllm", "flashinfer", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "processors": card.multi_processor_count, "gib": card.total_memory / 2**30}
        found |= {"cuda": torch.version.cuda, "capability": str(torch.cuda.get_device_capability(device))}
    return found


def _product(device: torch.device, size: str) -> Found:
    width = 8192 if size == "whole" else 64
    first, second = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"tflops": 2 * width**3 / seconds_of(lambda: first @ second, 10, device) / 1e12}


def _matrix_vector(device: torch.device, size: str) -> Found:
    """What a decode step of one sequence does most of the time, by torch's own GEMM."""
    rows, width = (2 * 14336, 4096) if size == "whole" else (64, 32)
    weights = [torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(4)]  # more than a cache
    vector = torch.randn(1, width, device=device, dtype=torch.bfloat16)

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(vector, weight)

    return {"gb_per_s": 4 * weights[0].nbytes / seconds_of(run, 20, device) / 1e9}


def _launch(device: torch.device) -> Found:
    number = torch.zeros(8, device=device)
    return {"microseconds": 1e6 * seconds_of(lambda: number.add_(1), 2000, device)}


def _imports() -> Found:
    from ts_parallel.runtime.backends.choose import describe_choice

    choice = describe_choice(torch.device("cuda", 0), torch.bfloat16)
    return {"backend": choice.backend, "why": choice.why, "is_right": choice.backend == "cuda"}
