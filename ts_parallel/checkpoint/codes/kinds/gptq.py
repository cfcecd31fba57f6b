"""GPTQ: integers of 2, 4 or 8 bits, packed along a linear's inputs, of which each belongs to a group of scales.

`qweight` `[I · bits / 32, O]`, `scales` `[G, O]`, `qzeros` `[G, O · bits / 32]`, `g_idx` `[I]` which says the group of
each input, in any order (act-order). The first format stores zero points less one, the second as they are
(https://github.com/ModelCloud/GPTQModel, `convert_gptq_v1_to_v2_format`). A weight is `scale · (integer - zero)` in the
scales' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ts_parallel.checkpoint.codes.integers import Read, RowIntegers
from ts_parallel.checkpoint.codes.kinds.numbers import PackedIntegers, transposed
from ts_parallel.checkpoint.codes.kinds.scheme import INSTEAD, Made, lacks, made, misfit, refuse_unknown
from ts_parallel.checkpoint.stored import Box, CheckpointIndex, StoredTensor
from ts_parallel.errors import CheckpointError

_BITS = (2, 4, 8)
_FORMATS = {None: "gptq", "gptq": "gptq", "gptq_v2": "gptq_v2"}
_KNOWN: dict[str, tuple[Any, ...] | None] = {
    # How the integers were found, or who reads them by which kernel; the tensors say all that counts here.
    **dict.fromkeys(("quant_method", "bits", "group_size", "desc_act", "sym", "damp_percent", "damp_auto_increment")),
    **dict.fromkeys(("static_groups", "true_sequential", "lm_head", "dataset", "tokenizer", "model_seqlen", "backend")),
    **dict.fromkeys(("block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id")),
    **dict.fromkeys(("use_cuda_fp16", "disable_exllama", "use_exllama", "exllama_config", "max_input_length")),
    **dict.fromkeys(("cache_block_outputs", "modules_in_block_to_quantize", "modules_to_not_convert", "quantizer")),
    **dict.fromkeys(("model_name_or_path", "model_file_base_name", "meta", "dynamic", "mse", "act_group_aware")),
    **dict.fromkeys(("parallel_packing", "offload_to_disk", "hyb_act", "fail_safe", "is_marlin_format_checked")),
    "checkpoint_format": tuple(_FORMATS),
    "format": tuple(_FORMATS),
    "pack_dtype": ("int32", None),
    "is_marlin_format": (False, None),
    "method": ("gptq", None),
}


@dataclass(frozen=True)
class Gptq:
    num_bits: int | None
    """Of its integers, where the section says it and no module has others."""
    subtracts_one: bool
    """Whether zero points are stored less one."""

    @staticmethod
    def parse(section: Mapping[str, Any], said: str) -> Gptq:
        refuse_unknown(section, _KNOWN, said)
        bits = section.get("bits")
        if bits not in _BITS:
            raise CheckpointError(f"{said} has bits {bits!r}; integers of {_BITS} bits are read here: {INSTEAD}")
        form = _FORMATS[section.get("checkpoint_format", section.get("format"))]
        return Gptq(None if section.get("dynamic") else bits, form == "gptq")

    def make(self, index: CheckpointIndex, dtype: torch.dtype) -> Iterator[Made]:
        for name, words in index.items():
            module, _, end = name.rpartition(".")
            if end == "qweight":
                yield self._make(module, words, index, dtype)

    def _make(self, module: str, words: StoredTensor, index: CheckpointIndex, dtype: torch.dtype) -> Made:
        scales, zeros, groups = (index.get(f"{module}.{end}") for end in ("scales", "qzeros", "g_idx"))
        for stored, end in ((scales, "scales"), (zeros, "qzeros")):
            if stored is None:
                raise lacks(words, f"{module}.{end}")
        assert scales is not None and zeros is not None
        is_fit = all(each.dtype == torch.int32 and len(each.shape) == 2 for each in (words, zeros))
        if not is_fit or len(scales.shape) != 2 or words.shape[1] != scales.shape[1] or not words.shape[1]:
            raise misfit(words, None, module)
        num_groups, num_outputs = scales.shape
        bits = zeros.shape[1] * 32 // num_outputs
        if (
            bits not in _BITS
            or self.num_bits not in (None, bits)
            or zeros.shape != (num_groups, num_outputs * bits // 32)
        ):
            raise misfit(zeros, None, module)
        num_inputs = words.shape[0] * 32 // bits
        if groups is None and num_inputs % num_groups:
            raise misfit(scales, None, module)
        if groups is not None and groups.shape != (num_inputs,):
            raise misfit(groups, (num_inputs,), module)
        shape = (num_outputs, num_inputs)
        integers = StoredTensor(
            words.name, torch.int16, (num_inputs, num_outputs), words.parts, PackedIntegers(words, 0, bits)
        )
        one = sum(1 << place for place in range(0, 32, bits)) if self.subtracts_one else 0
        unpacked = PackedIntegers(zeros, 1, bits, added=one)
        codes = GroupedIntegers(
            integers, scales, StoredTensor(zeros.name, torch.int16, scales.shape, zeros.parts, unpacked), groups
        )
        uses = [each.name for each in (scales, zeros, groups) if each is not None]
        return made(f"{module}.weight", dtype, shape, codes, words, *uses)

    def __str__(self) -> str:
        return f"{f'int{self.num_bits}' if self.num_bits else 'integers'} of GPTQ"


@dataclass(frozen=True)
class GroupedIntegers:
    """`(integer - zero) · scale` of `[I, O]` integers, transposed. G groups."""

    integers: StoredTensor
    """`[I, O]`"""
    scales: StoredTensor
    """`[G, O]`, of the dtype that is computed in."""
    zeros: StoredTensor
    """`[G, O]`"""
    groups: StoredTensor | None
    """Each input's, `[I]`; None where neighbours make up a group."""

    @property
    def cut_order(self) -> tuple[int, ...]:
        return (1, 0)

    def decode(self, box: Box, read: Read) -> torch.Tensor:
        outputs, inputs = box
        integers = read(self.integers, (inputs, outputs))
        groups = self._groups(inputs, read)
        first, last = int(groups.min()), int(groups.max())
        cells = ((first, last - first + 1), outputs)
        scales, zeros = read(self.scales, cells), read(self.zeros, cells)
        return ((integers - zeros[groups - first]) * scales[groups - first]).mT

    def row_integers(self, read: Read) -> RowIntegers | None:
        packed, (num_inputs, num_groups) = self.integers.codes, (self.integers.shape[0], self.scales.shape[0])
        if not isinstance(packed, PackedIntegers) or num_inputs % num_groups:
            return None
        group, zero = num_inputs // num_groups, 2 ** (packed.bits - 1)
        if (read(self.zeros, tuple((0, size) for size in self.zeros.shape)) != zero).any():
            return None
        if not torch.equal(self._groups((0, num_inputs), read), torch.arange(num_inputs) // group):
            return None
        signed = replace(self.integers, dtype=torch.int8, codes=replace(packed, offset=zero))
        return RowIntegers(packed.bits, transposed(signed), transposed(self.scales), group)

    def _groups(self, inputs: tuple[int, int], read: Read) -> torch.Tensor:
        start, length = inputs
        if self.groups is None:
            return torch.arange(start, start + length) // (self.integers.shape[0] // self.scales.shape[0])
        groups = read(self.groups, (inputs,)).long()
        if not 0 <= int(groups.min()) <= int(groups.max()) < self.scales.shape[0]:
            raise CheckpointError(
                f"{self.groups.name!r} in {self.groups.file} names groups from {int(groups.min())} to "
                f"{int(groups.max())}, {self.scales.name!r} has {self.scales.shape[0]}"
            )
        return groups
