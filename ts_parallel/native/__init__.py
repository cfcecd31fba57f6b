"""What is written in C: compiled when the package is installed, and left out where it cannot be.

The kernels are compiled once for each instruction set (instructions/), and the first that this processor has is
`kernels`: numbers differ in their last bits from one to another, and never from step to step within one. Those are for
bfloat16. Others, which multiply float32, are compiled for float16: `kernels_for` has both.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from ts_parallel.native.kernel_calls import Kernels

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
    float16: Variant | None = None
    """What computes float16 where this one computes bfloat16."""

    @property
    def module(self) -> str:
        return f"ts_parallel.native.kernels_{self.name}"

    @property
    def is_compiled(self) -> bool:
        return find_spec(self.module) is not None


_AVX512 = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"})
_AVX512_BF16 = _AVX512 | {"avx512_bf16", "avx512vbmi"}
_AMX = frozenset({"amx_tile", "amx_bf16"})
_AVX2 = frozenset({"avx2", "fma"})
_NEON = frozenset({"asimd"})
_AVX512_FLOAT16 = Variant("avx512_float16", "AVX-512", _AVX512)
_AVX2_FLOAT16 = Variant("avx2_float16", "AVX2", _AVX2 | {"f16c"})
_NEON_FLOAT16 = Variant("neon_float16", "NEON", _NEON)
VARIANTS = (
    Variant("amx", "AMX", _AVX512_BF16 | _AMX, float16=_AVX512_FLOAT16),
    Variant("avx512_bf16", "AVX-512 BF16", _AVX512_BF16, float16=_AVX512_FLOAT16),
    Variant("avx512", "AVX-512", _AVX512, float16=_AVX512_FLOAT16),
    Variant("avx2", "AVX2", _AVX2, float16=_AVX2_FLOAT16),
    Variant("neon_bf16", "NEON BF16", _NEON | {"bf16"}, float16=_NEON_FLOAT16),
    Variant("neon", "NEON", _NEON, float16=_NEON_FLOAT16),
    # For comparison.
    Variant("plain", "plain C", frozenset(), is_taken=False, float16=Variant("plain_float16", "plain C", frozenset())),
)
"""Those for bfloat16, the fastest first."""


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


def float16_beside(variant: Variant | None, why: str, flags: Collection[str]) -> tuple[Variant | None, str]:
    """What computes float16 where `variant`, chosen for the reason `why`, computes bfloat16; as `choose_variant`."""
    own = variant.float16 if variant else None
    if own is None:
        return None, why
    missing = sorted(own.needs - frozenset(flags))
    if missing:
        return None, f"for float16 this processor lacks {', '.join(missing)}"
    if not own.is_compiled:
        return None, "those for float16 were not compiled when the package was installed"
    return own, why


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

_VARIANT_OF = {torch.bfloat16: (VARIANT, WHY), torch.float16: float16_beside(VARIANT, WHY, processor_flags())}
_KERNELS_OF: dict[torch.dtype, Kernels] = {}
for _dtype, (_variant, _) in _VARIANT_OF.items():
    if _variant is not None:
        _KERNELS_OF[_dtype] = cast("Kernels", import_module(_variant.module))

if TYPE_CHECKING:
    kernels: Kernels
else:
    kernels = _KERNELS_OF.get(torch.bfloat16)


def variant_for(dtype: torch.dtype) -> tuple[Variant | None, str]:
    """The variant that computes numbers of `dtype` here, and why it, or why none."""
    return _VARIANT_OF.get(dtype, (None, "the kernels are for bfloat16 and float16"))


def kernels_for(dtype: torch.dtype) -> Kernels | None:
    """The kernels for numbers of `dtype`, if there are any here."""
    return _KERNELS_OF.get(dtype)


__all__ = [
    "CANNOT_BE_HAD",
    "HAS_KERNELS",
    "ISA_VARIABLE",
    "VARIANT",
    "VARIANTS",
    "WHY",
    "kernels",
    "kernels_for",
    "usable_variants",
    "variant_for",
]
