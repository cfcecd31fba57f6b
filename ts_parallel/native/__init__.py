"""What is written in C: compiled when the package is installed, and left out where it cannot be."""

try:
    from ts_parallel.native import kernels
except ImportError:  # no compiler where the package was installed
    kernels = None  # type: ignore[assignment]

HAS_KERNELS = kernels is not None and kernels.is_supported()
"""Whether this processor can run the kernels, and they were compiled."""

__all__ = ["HAS_KERNELS", "kernels"]
