"""Floating point numbers of eight bits with scales beside them: of blocks, rows or whole tensors.

DeepSeek's and Qwen's (`quant_method` fp8), fbgemm's and ModelOpt's (`quant_algo` FP8). The product is computed in
float32, as transformers does it (`Fp8Dequantize`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ts_parallel.checkpoint.codes.kinds.numbers import ScaledNumbers, grid_of
from ts_parallel.checkpoint.codes.kinds.scheme import INSTEAD, Made, lacks, made, misfit, refuse_unknown
from ts_parallel.checkpoint.stored import CheckpointIndex, StoredTensor
from ts_parallel.errors import CheckpointError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")  # what a weight's name has behind it
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
# Of activations and of the KV cache, neither of which is quantised here.
OF_ACTIVATIONS = re.compile(
    r".+\.(activation_scale|input_scale|input_scale_ub|output_scale|([kvq]_|prob_)(proj\.)?(output_)?scale)"
)

_KNOWN: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("quant_method", "activation_scheme", "activation_scale_ub", "weight_block_size", "scale_fmt")),
    **dict.fromkeys(("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "kv_cache_scheme")),
    **dict.fromkeys(("kv_cache_quant_algo", "kv_cache_quant_method", "dequantize", "modules_to_convert", "producer")),
    "fmt": ("e4m3", "float8_e4m3fn", None),
    "quant_algo": ("FP8",),
    "is_checkpoint_fp8_serialized": (True,),
}


@dataclass(frozen=True)
class Fp8:
    block: tuple[int, ...] | None
    """Rows and columns that share a scale, where that is said."""
    bytes_are_exponents: bool = False
    """Whether scales stored as bytes are powers of two."""

    @staticmethod
    def parse(section: Mapping[str, Any], said: str) -> Fp8:
        refuse_unknown(section, {**_KNOWN, **_modelopt(section)}, said)
        block = section.get("weight_block_size")
        if block is not None:
            if (
                not isinstance(block, list)
                or len(block) != 2
                or any(type(size) is not int or size < 1 for size in block)
            ):
                raise CheckpointError(f"{said} has weight_block_size {block!r}, not two numbers: {INSTEAD}")
            block = tuple(block)
        return Fp8(block, section.get("scale_fmt") == "ue8m0")

    def make(self, index: CheckpointIndex, dtype: torch.dtype) -> Iterator[Made]:
        for name, stored in index.items():
            if stored.dtype in FP8:
                scales = next((index[name + end] for end in _SCALES if name + end in index), None)
                if scales is None:
                    raise lacks(stored, name + _SCALES[0])
                yield made(name, dtype, stored.shape, self._codes(stored, scales), stored, scales.name)
            elif OF_ACTIVATIONS.fullmatch(name):
                yield Made(None, (name,))

    def _codes(self, stored: StoredTensor, scales: StoredTensor) -> ScaledNumbers:
        dtypes = (*_SCALE_DTYPES, torch.uint8) if self.bytes_are_exponents else _SCALE_DTYPES
        block = grid_of(stored.shape, scales.shape, self.block)
        if block is None or scales.dtype not in dtypes:
            raise misfit(scales, None, stored.name)
        return ScaledNumbers(stored, scales, block, torch.float32)

    def __str__(self) -> str:
        return "FP8 with scales" + (f" of {self.block[0]}×{self.block[1]} numbers" if self.block else "")


def _modelopt(section: Mapping[str, Any]) -> dict[str, tuple[Any, ...] | None]:
    """Further keys of a section that ModelOpt wrote into config.json, which says the same a second time."""
    if section.get("quant_method") != "modelopt":
        return {}
    return dict.fromkeys(("config_groups", "kv_cache_scheme"))
