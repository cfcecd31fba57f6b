"""Which machine this is: its processor, the instruction sets that matter to models, the cores that may be used.

Knows Linux's files, and neither torch nor models: a client that loads neither may ask.
"""

from __future__ import annotations

import ipaddress
import os
import platform
from dataclasses import dataclass
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")

# As the system calls what it has → as it is read, the least first; of x86, then of ARM.
_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512vbmi": "AVX512-VBMI",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Machine:
    """What this process can compute with, where no GPU does."""

    processor: str
    """Its model's name; the architecture where the system names no model."""
    num_cores: int
    """Logical ones that this process may be scheduled on."""
    instruction_sets: tuple[str, ...]
    """Those beyond the architecture's own that the processor has, the least first."""


def this_machine(cpu_info: Path = _CPU_INFO) -> Machine:
    """What `cpu_info` says of the first processor, and how many cores this process has."""
    try:
        first = cpu_info.read_text().partition("\n\n")[0]
    except OSError:
        first = ""
    lines = (line.partition(":") for line in first.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return Machine(
        fields.get("model name") or f"an unnamed {platform.machine()} processor",
        len(os.sched_getaffinity(0)),
        tuple(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags),
    )


def core_quota(file: Path = _QUOTA) -> float | None:
    """How many cores' time a container may take together; None where nothing bounds it."""
    try:
        quota, period = file.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def is_loopback(host: str) -> bool:
    """Whether an address or name can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
