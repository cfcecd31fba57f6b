"""compressed-tensors (llm-compressor, RedHatAI): FP8 and int8 with scales beside them, integers packed in words.

A weight is `(number - zero) · scale` in the scale's own dtype, as its `dequantize` does it: what that rounds, rounds
here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ts_parallel.checkpoint.codes.blocks import read_whole
from ts_parallel.checkpoint.codes.kinds.fp8 import FP8
from ts_parallel.checkpoint.codes.kinds.numbers import PackedIntegers, ScaledNumbers, grid_of
from ts_parallel.checkpoint.codes.kinds.scheme import INSTEAD, Made, lacks, made, misfit, refuse_unknown
from ts_parallel.checkpoint.stored import CheckpointIndex, StoredTensor
from ts_parallel.errors import CheckpointError

_FORMATS = ("float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "mixed-precision")
_PACKED = re.compile(r"(?P<module>.+)\.weight_packed")
_OF_WEIGHT = ("weight_scale", "weight_zero_point", "weight_shape", "weight_packed", "weight")
_OF_ACTIVATIONS = re.compile(
    r".+\.((input|output|[kvq])_(scale|zero_point|global_scale)|weight_observer\..+|(input|output)_observer\..+)"
)
_KNOWN: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("quant_method", "config_groups", "ignore", "kv_cache_scheme", "global_compression_ratio")),
    **dict.fromkeys(
        ("version", "run_compressed", "dequantize", "use_optimized_inference", "is_quantization_compressed")
    ),
    "format": _FORMATS,
    "quantization_status": ("compressed",),
}
_KNOWN_OF_GROUP: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("targets", "weights", "input_activations", "output_activations")),
    "format": (*_FORMATS, None),
}
_KNOWN_OF_WEIGHTS: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "observer")),
    **dict.fromkeys(("observer_kwargs", "scale_dtype", "zp_dtype", "is_mse")),
    "dynamic": (False, None),
    "actorder": (None, False, "weight", "static"),  # by the order of columns nothing is stored otherwise
}


@dataclass(frozen=True)
class _Group:
    targets: tuple[str, ...]
    num_bits: int
    is_float: bool
    block: tuple[int, ...] | None

    def precedence(self, module: str) -> int:
        """How well it is meant for `module`: by its own name, by a pattern, or by its class alone; 0 if not at all."""
        if any(module == target or module.endswith(f".{target}") for target in self.targets):
            return 3
        if any(target.startswith("re:") and re.match(target[3:], module) for target in self.targets):
            return 2
        return int(any(not target.startswith("re:") for target in self.targets))


@dataclass(frozen=True)
class CompressedTensors:
    groups: tuple[_Group, ...]

    @staticmethod
    def parse(section: Mapping[str, Any], said: str) -> CompressedTensors:
        refuse_unknown(section, _KNOWN, said)
        groups = section.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"{said} has no config_groups that tell how weights are stored: {INSTEAD}")
        return CompressedTensors(tuple(_parse_group(own, f"{said}.config_groups.{key}") for key, own in groups.items()))

    def make(self, index: CheckpointIndex, dtype: torch.dtype) -> Iterator[Made]:
        modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name, stored in index.items():
            module, _, end = name.rpartition(".")
            if end in _OF_WEIGHT:
                modules[module][end] = stored
            elif _OF_ACTIVATIONS.fullmatch(name):
                yield Made(None, (name,))
        for module, own in modules.items():
            if "weight_packed" in own or (own["weight"].dtype in (*FP8, torch.int8) if "weight" in own else False):
                yield self._make(module, own, dtype)

    def _make(self, module: str, own: Mapping[str, StoredTensor], dtype: torch.dtype) -> Made:
        name = f"{module}.weight"
        group = max(self.groups, key=lambda each: each.precedence(module))
        main = own.get("weight_packed", own.get("weight"))
        assert main is not None
        if not group.precedence(module):
            raise CheckpointError(
                f"{main.file} holds {main.name!r}, for which config_groups names no scheme: {INSTEAD}"
            )
        scales, zeros = own.get("weight_scale"), own.get("weight_zero_point")
        if scales is None:
            raise lacks(main, f"{module}.weight_scale")
        numbers = main if "weight" in own else _packed(name, main, own.get("weight_shape"), group)
        uses = tuple(stored.name for stored in own.values())
        if zeros is not None and "weight_packed" in own:
            zeros = _unpacked_zeros(zeros, scales, group)
        block = grid_of(numbers.shape, scales.shape, group.block)
        if block is None or not scales.dtype.is_floating_point or (zeros and zeros.shape != scales.shape):
            raise misfit(scales, None, name)
        # transformers folds the scales into FP8 experts one by one, in float32.
        in_float32 = numbers.dtype in FP8 and ".experts." in name
        codes = ScaledNumbers(numbers, scales, block, torch.float32 if in_float32 else scales.dtype, zeros)
        return made(name, dtype, numbers.shape, codes, main, *uses)

    def __str__(self) -> str:
        kinds = dict.fromkeys(f"{'FP' if group.is_float else 'int'}{group.num_bits}" for group in self.groups)
        return f"{' and '.join(kinds)} with scales (compressed-tensors)"


def _parse_group(group: Any, said: str) -> _Group:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{said} does not tell how weights are stored: {INSTEAD}")
    refuse_unknown(group, _KNOWN_OF_GROUP, said)
    refuse_unknown(weights, _KNOWN_OF_WEIGHTS, f"{said}.weights")
    num_bits, kind = weights.get("num_bits", 8), str(weights.get("type", "int")).lower()
    if (kind, num_bits) not in {("float", 8), ("int", 8), ("int", 4), ("int", 2)}:
        raise CheckpointError(
            f"{said} has weights of {kind} with {num_bits!r} bits, which are not read here: {INSTEAD}"
        )
    block = weights.get("block_structure")
    if isinstance(block, str):
        block = [int(size) for size in block.split("x") if size.isdecimal()]
    return _Group(
        tuple(str(target) for target in group.get("targets") or ["Linear"]),
        num_bits,
        kind == "float",
        tuple(block) if isinstance(block, list) and len(block) == 2 else None,
    )


def _packed(name: str, words: StoredTensor, size: StoredTensor | None, group: _Group) -> StoredTensor:
    """Its integers `[O, I]`, of which each word of `words` `[O, ⌈I · bits / 32⌉]` holds several; `size` is (O, I)."""
    if words.dtype != torch.int32 or len(words.shape) != 2 or group.is_float:
        raise misfit(words, None, name)
    count = 32 // group.num_bits
    shape = (words.shape[0], words.shape[1] * count)
    if size is not None and size.shape == (2,) and not size.dtype.is_floating_point:
        said = tuple(int(each) for each in read_whole(size))
        if said[0] != shape[0] or -(-said[1] // count) != words.shape[1]:
            raise misfit(words, None, f"{name} of shape {list(said)}")
        shape = said[0], said[1]
    integers = PackedIntegers(words, 1, group.num_bits, 2 ** (group.num_bits - 1))
    return StoredTensor(name, torch.int8, shape, words.parts, integers)


def _unpacked_zeros(zeros: StoredTensor, scales: StoredTensor, group: _Group) -> StoredTensor:
    if zeros.dtype != torch.int32 or len(zeros.shape) != 2 or zeros.shape[1:] != scales.shape[1:]:
        raise misfit(zeros, None, scales.name)
    integers = PackedIntegers(zeros, 0, group.num_bits, 2 ** (group.num_bits - 1))
    return StoredTensor(zeros.name, torch.int8, scales.shape, zeros.parts, integers)
