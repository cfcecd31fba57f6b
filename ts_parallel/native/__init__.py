"""What is written in C: compiled when the package is installed, and left out where it cannot be."""

from __future__ import annotations

import os

try:
    from ts_parallel.native import kernels
except ImportError:  # no compiler where the package was installed
    kernels = None  # type: ignore[assignment]

ISA_VARIABLE = "TS_PARALLEL_ISA"
"""`none` leaves the kernels out, as if this processor had nothing that they need."""

HAS_KERNELS = kernels is not None and kernels.is_supported() and os.environ.get(ISA_VARIABLE) != "none"
"""Whether this processor can run the kernels, and they were compiled. `runtime.backends.choose` asks; else tests do."""


def why_no_kernels() -> str:
    """Half a sentence for a log or an error."""
    if kernels is None:
        return "they were not compiled when the package was installed"
    if not kernels.is_supported():
        return "this processor lacks AVX-512 with BF16 and VBMI"
    return f"{ISA_VARIABLE} is none"


__all__ = ["HAS_KERNELS", "ISA_VARIABLE", "kernels", "why_no_kernels"]
