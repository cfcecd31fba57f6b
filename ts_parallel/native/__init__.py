"""What is written in C: compiled when the package is installed, and left out where it cannot be.

The kernels are compiled once for each instruction set (instructions/), and the first that this processor has is
`kernels`: numbers differ in their last bits from one to another, and never from step to step within one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ts_parallel.native import kernels

ISA_VARIABLE = "TS_PARALLEL_ISA"
"""The name of a variant, which is taken then; or `none`, which leaves the kernels out."""


@dataclass(frozen=True)
class Variant:
    """The kernels for one instruction set."""

    name: str
    """As `ISA_VARIABLE` spells it, and as `instructions/NAME.h` is called, or begins."""
    label: str
    needs: frozenset[str]
    """Of the processor's flags, as /proc/cpuinfo spells them."""
    is_taken: bool = True
    """Whether it is taken where nobody asks for it by name."""

    @property
    def module(self) -> str:
        return f"ts_parallel.native.kernels_{self.name}"

    @property
    def is_compiled(self) -> bool:
        return find_spec(self.module) is not None


_AVX512 = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"})
_AVX512_BF16 = _AVX512 | {"avx512_bf16", "avx512vbmi"}
_AMX = frozenset({"amx_tile", "amx_bf16"})
VARIANTS = (
    Variant("amx", "AMX", _AVX512_BF16 | _AMX),
    Variant("avx512_bf16", "AVX-512 BF16", _AVX512_BF16),
    Variant("avx512", "AVX-512", _AVX512),
    Variant("avx2", "AVX2", frozenset({"avx2", "fma"})),
    Variant("neon_bf16", "NEON BF16", frozenset({"asimd", "bf16"})),
    Variant("neon", "NEON", frozenset({"asimd"})),
    Variant("plain", "plain C", frozenset(), is_taken=False),  # for comparison
)
"""The fastest first."""


def processor_flags() -> frozenset[str]:
    """What this processor says that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    own = (line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(own, "").split())


def may_use_tiles() -> bool:
    """Ask Linux for AMX's registers, which a process has not from the start, for each thread's state grows by 8 KiB."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    answer: int = ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data)
    return answer == 0


def usable_variants(flags: Collection[str] | None = None) -> list[Variant]:
    """Those that a processor with these flags, by default this one, has all for, that were compiled, and that are taken
    where nobody asks for one by name."""
    found = _flags if flags is None else frozenset(flags)
    return [variant for variant in VARIANTS if variant.is_taken and variant.needs <= found and variant.is_compiled]


def choose_variant(wanted: str, flags: Collection[str]) -> tuple[Variant | None, str]:
    """The variant that `wanted`, the value of `ISA_VARIABLE`, and the processor's flags lead to, or none.

    Returns:
        The variant, and half a sentence that says why it is none, or none better.
    """
    if wanted == "none":
        return None, f"{ISA_VARIABLE} is none"
    by_name = {variant.name: variant for variant in VARIANTS}
    if wanted:
        if wanted not in by_name:
            return None, f"{ISA_VARIABLE} is {wanted!r}, not none or one of {', '.join(by_name)}"
        missing = sorted(by_name[wanted].needs - frozenset(flags))
        if missing:
            return None, f"{ISA_VARIABLE} is {wanted}, and this processor lacks {', '.join(missing)}"
        if not by_name[wanted].is_compiled:
            return None, f"{ISA_VARIABLE} is {wanted}, which was not compiled when the package was installed"
        return by_name[wanted], f"{ISA_VARIABLE} is {wanted}"
    usable = usable_variants(flags)
    if usable:
        return usable[0], "the best of what this processor has"
    if any(variant.is_taken and variant.needs <= frozenset(flags) for variant in VARIANTS):
        return None, "they were not compiled when the package was installed"
    return None, "this processor has neither AVX2 with FMA nor NEON"


_wanted, _flags = os.environ.get(ISA_VARIABLE, ""), processor_flags()
VARIANT, WHY = choose_variant(_wanted, _flags)
"""The variant that runs here, and why it, or why none. `runtime.backends.choose` asks; else tests do."""

if VARIANT is not None and VARIANT.needs & _AMX and not may_use_tiles():
    _flags -= _AMX
    VARIANT, WHY = choose_variant(_wanted, _flags)
    WHY += ", as the system gives this process no tiles"

CANNOT_BE_HAD = VARIANT is None and _wanted not in ("", "none")
"""Whether a variant was asked for by name that cannot run here."""

HAS_KERNELS = VARIANT is not None

if not TYPE_CHECKING:
    kernels = import_module(VARIANT.module) if VARIANT else None

__all__ = ["CANNOT_BE_HAD", "HAS_KERNELS", "ISA_VARIABLE", "VARIANT", "VARIANTS", "WHY", "kernels", "usable_variants"]
