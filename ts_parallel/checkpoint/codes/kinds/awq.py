"""AWQ (gemm): integers of four bits, packed along a linear's outputs in an order of their own.

`qweight` `[I, O / 8]`, `qzeros` `[G, O / 8]`, `scales` `[G, O]`, groups of neighbouring inputs
(https://github.com/casper-hansen/AutoAWQ, `dequantize_gemm`). A weight is `(integer - zero) · scale` in the scales'
dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ts_parallel.checkpoint.codes.kinds.gptq import GroupedIntegers
from ts_parallel.checkpoint.codes.kinds.numbers import PackedIntegers
from ts_parallel.checkpoint.codes.kinds.scheme import Made, lacks, made, misfit, refuse_unknown
from ts_parallel.checkpoint.stored import CheckpointIndex, StoredTensor

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the first to the eighth output are
_KNOWN: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("quant_method", "group_size", "q_group_size", "zero_point", "modules_to_not_convert", "backend")),
    **dict.fromkeys(("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "desc_act", "sym", "meta")),
    **dict.fromkeys(("lm_head", "pack_dtype", "dynamic", "true_sequential", "damp_percent", "static_groups")),
    "bits": (4,),
    "w_bit": (4,),
    "version": ("gemm", "GEMM"),
    "format": ("gemm", "GEMM", None),
    "checkpoint_format": ("gemm", "GEMM", None),
    "method": ("awq", None),
}


@dataclass(frozen=True)
class Awq:
    @staticmethod
    def parse(section: Mapping[str, Any], said: str) -> Awq:
        refuse_unknown(section, _KNOWN, said)
        return Awq()

    def make(self, index: CheckpointIndex, dtype: torch.dtype) -> Iterator[Made]:
        for name, words in index.items():
            module, _, end = name.rpartition(".")
            if end != "qweight":
                continue
            scales, zeros = (index.get(f"{module}.{each}") for each in ("scales", "qzeros"))
            for stored, lacking in ((scales, "scales"), (zeros, "qzeros")):
                if stored is None:
                    raise lacks(words, f"{module}.{lacking}")
            assert scales is not None and zeros is not None
            yield _make(module, words, scales, zeros, dtype)

    def __str__(self) -> str:
        return "int4 of AWQ"


def _make(module: str, words: StoredTensor, scales: StoredTensor, zeros: StoredTensor, dtype: torch.dtype) -> Made:
    for each in (words, zeros):
        if each.dtype != torch.int32 or len(each.shape) != 2:
            raise misfit(each, None, module)
    num_inputs, num_outputs = words.shape[0], words.shape[1] * 8
    if len(scales.shape) != 2 or scales.shape[1] != num_outputs or num_inputs % max(1, scales.shape[0]):
        raise misfit(scales, None, module)
    if zeros.shape != (scales.shape[0], words.shape[1]):
        raise misfit(zeros, (scales.shape[0], words.shape[1]), module)
    codes = GroupedIntegers(_unpacked(words), scales, _unpacked(zeros), None)
    return made(f"{module}.weight", dtype, (num_outputs, num_inputs), codes, words, scales.name, zeros.name)


def _unpacked(words: StoredTensor) -> StoredTensor:
    shape = (words.shape[0], words.shape[1] * 8)
    return StoredTensor(words.name, torch.int16, shape, words.parts, PackedIntegers(words, 1, 4, order=_PLACES))
