"""Compiles the Triton kernels for a GPU that need not be there, as a backend would launch them; prints what they take.

    TRITON_INTERPRET=0 python tests/compile_kernels.py 90 [CASE…]

One line of JSON a kernel: its case, its name, bytes of shared memory, registers of a thread, and bytes that a thread
spills to local memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ts_parallel.partition.program import AttentionSite
from ts_parallel.runtime.backends.cuda.attention import CudaAttention
from ts_parallel.runtime.backends.cuda.kernels import attention, elementwise
from ts_parallel.runtime.backends.kv_memory import KVMemory

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INTEGERS = {"slots", "chunks", "tiles", "decodes", "block_ids"}
FLOATS = {"scaling", "softcap", "epsilon"}
ODD = {"num_heads", "num_kv_heads", "num_inner"}  # all others are multiples of 16, which Triton is told at a launch
OF_SPLITS = {"sums_of_splits", "weights_of_splits"}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def site(heads: int, kv_heads: int, dim: int, value_dim: int, window: int | None, softcap: float | None) -> Any:
    return AttentionSite("", heads, kv_heads, dim, value_dim, window, 0.1, softcap, False)


CASES = {
    "llama": (site(32, 8, 128, 128, None, None), False, torch.bfloat16),
    "llama in float32": (site(32, 8, 128, 128, None, None), False, torch.float32),
    "gemma 2": (site(16, 8, 256, 256, 4096, 50.0), False, torch.bfloat16),
    "gemma 2 in float32": (site(16, 8, 256, 256, 4096, 50.0), False, torch.float32),
    "gpt-oss": (site(64, 8, 64, 64, 128, None), True, torch.bfloat16),
    "falcon": (site(71, 1, 64, 64, None, None), False, torch.float16),
    "deepseek": (site(16, 16, 192, 128, None, None), False, torch.bfloat16),
    "phi": (site(32, 32, 80, 80, None, None), False, torch.float16),
}


def compiled(kernel: Any, dtype: torch.dtype, constants: dict[str, Any], capability: int, **options: int) -> Any:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return "*i64"
        if name in OF_SPLITS:
            return "*fp32"
        if name in FLOATS:
            return "fp32"
        is_number = name.rpartition("_")[2] in {"token", "head", "heads", "outer", "inner", "row"}
        return "i32" if is_number else f"*{TYPES[dtype]}"

    signature = {name: kind(name) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [number for number, name in enumerate(kernel.arg_names) if kind(name) not in ("constexpr", "fp32")]
    even = {(number,): [["tt.divisibility", 16]] for number in aligned if kernel.arg_names[number] not in ODD}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=even)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def tell(
    case: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any], capability: int, **options: int
) -> None:
    made = compiled(kernel, dtype, constants, capability, **options)
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told))
    line = {"case": case, "kernel": kernel.__name__, "shared": made.metadata.shared}
    print(json.dumps({**line, "registers": int(found["REG"]), "spilled": int(found["STACK"])}), flush=True)


def main() -> None:
    capability, *names = sys.argv[1:]
    for case in names or CASES:
        own, has_sinks, dtype = CASES[case]
        memory = KVMemory([own], 1, 16, dtype, torch.device("cpu"))
        made = CudaAttention([own], memory, 16)
        numbers, shared = made._numbers[0], {**made._shared(0), "WIDENS": False}
        options = {name: shared.pop(name) for name in ("num_warps", "num_stages")}
        widths = {name: shared[name] for name in ("VALUE_DIM", "VALUE_WIDTH")}
        tile = {"HEADS": numbers.tile_heads, "TOKENS": made._tokens_of_tile, "HAS_SINKS": has_sinks}
        turn = {name: shared[name] for name in ("BLOCK_SIZE", "DIM", "WIDTH")} | widths | {"TURNS": True}
        kernels: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
            (attention.attend_tiles, {**shared, **tile}, options),
            (attention.attend_splits, {**shared, "HEADS": numbers.decode_heads, "SPLITS": 8}, options),
            (attention.join_splits, {**widths, "SPLITS": 8, "HAS_SINKS": has_sinks}, {"num_warps": 2}),
            (attention.turn_and_write, turn, {"num_warps": 1}),
        ]
        for kernel, constants, own_options in kernels:
            tell(case, kernel, dtype, constants, int(capability), **own_options)
    if not names:
        norm = {"K": 4096, "WIDTH": 4096, "ADDS": True, "IS_OFFSET": True}
        tell("norm", elementwise.rms_norm, torch.bfloat16, norm, int(capability), num_warps=8)
        gate = {"K": 14336, "WIDTH": 1024, "ACTIVATION": "gelu_tanh"}
        tell("gate", elementwise.gate, torch.bfloat16, gate, int(capability), num_warps=4)


if __name__ == "__main__":
    main()
