"""Compiles the C beside it while the package is installed: a hook of hatchling. Where that fails, the package does
without."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma"
_VARIANTS = {
    "x86_64": {
        "amx": ("amx.h", f"{_AVX512} -mavx512bf16 -mavx512vbmi -mamx-tile -mamx-bf16"),
        "avx512_bf16": ("avx512_bf16.h", f"{_AVX512} -mavx512bf16 -mavx512vbmi"),
        "avx512": ("avx512.h", _AVX512),
        "avx2": ("avx2.h", "-mavx2 -mfma"),
    },
    "aarch64": {"neon_bf16": ("neon.h", "-march=armv8.2-a+bf16"), "neon": ("neon.h", "")},
}
"""Machine → name of a variant of the kernels → which of instructions/ it is made of, and the compiler's flags. Which of
them a processor can run is asked when they are loaded."""
# Optimised, it takes a compiler's minutes, and is no faster for what it is there for.
_PLAIN = {"plain": ("plain.h", "-Og")}
_IN_FLOAT16 = {"avx512": "", "avx2": "-mf16c", "neon": "", "plain": ""}
"""Those that are compiled for float16 too, and further flags for it: they multiply float32."""


class CompileNative(BuildHookInterface[Any]):  # type: ignore[misc]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = Path(self.root, "ts_parallel", "native")
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        work: list[tuple[Path, Path, list[str]]] = [(folder / "shared_memory.c", folder / f"shared_memory{suffix}", [])]
        for module, options in kernel_modules(platform.machine()).items():
            work.append((folder / "kernels.c", folder / f"{module}{suffix}", [f"-DMODULE={module}", *options]))
        with ThreadPoolExecutor(os.cpu_count()) as compilers:
            compiled = list(compilers.map(_compile, *zip(*work, strict=True)))
        libraries = [library for (_, library, _), is_there in zip(work, compiled, strict=True) if is_there]
        if libraries:
            build_data["artifacts"] += [str(library.relative_to(self.root)) for library in libraries]
            build_data["pure_python"], build_data["infer_tag"] = False, True


def kernel_modules(machine: str) -> dict[str, list[str]]:
    """The modules of kernels for this machine, and the compiler's options for each."""
    modules = {}
    for name, (header, flags) in {**_VARIANTS.get(machine, {}), **_PLAIN}.items():
        modules[f"kernels_{name}"] = own = [f'-DINSTRUCTIONS="instructions/{header}"', *flags.split()]
        if name in _IN_FLOAT16:
            modules[f"kernels_{name}_float16"] = [*own, "-DIN_FLOAT16", *_IN_FLOAT16[name].split()]
    return modules


def _compile(source: Path, library: Path, options: list[str]) -> bool:
    compiler = shlex.split(os.environ.get("CC") or "cc")
    headers = [f"-I{source.parent}", f"-I{sysconfig.get_paths()['include']}"]
    # A product and a sum are one operation where the source says so: else it would be the compiler's choice, and bits
    # would depend on how many rows are multiplied at once.
    flags = ["-O3", "-std=gnu11", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", *headers, *options]
    partial = library.with_suffix(".partial")
    try:
        subprocess.run([*compiler, *flags, str(source), "-o", str(partial)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{library.name} is not compiled, others or torch's functions take its place: {error}", file=sys.stderr)
        library.unlink(missing_ok=True)
        return False
    partial.replace(library)  # a process that runs the old one keeps it
    return True
