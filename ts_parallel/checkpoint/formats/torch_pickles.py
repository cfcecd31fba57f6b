"""What torch's own pickles are made of: storages, and tensors that are a part of one. Knows no file.

A tensor names a storage, the element in it that it begins at, its shape and strides; two tensors may share a storage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ts_parallel.checkpoint.formats.pickles import Names

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


@dataclass(frozen=True)
class Storage:
    """Bytes of a file from `offset` on."""

    dtype: torch.dtype
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor where torch.save left it: `offset` is that of its first element, from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def is_row_major(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != step:
                return math.prod(self.shape) == 0
            step *= size
        return True


def _rebuild(
    storage: Storage,
    first: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    *_: Any,
    dtype: torch.dtype | None = None,
) -> PickledTensor:
    dtype = dtype or storage.dtype
    shape, stride = tuple(shape), tuple(stride)
    if len(shape) != len(stride) or any(type(size) is not int or size < 0 for size in (first, *shape, *stride)):
        raise ValueError(f"a tensor of shape {shape} and strides {stride}")
    last = first + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) and (last + 1) * dtype.itemsize > storage.num_bytes:
        raise ValueError(f"a tensor of shape {shape} in a storage of {storage.num_bytes} bytes")
    return PickledTensor(dtype, shape, stride, storage.offset + first * dtype.itemsize)


def _rebuild_of_dtype(  # for dtypes that have no storage class of their own
    storage: Storage,
    first: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: torch.dtype,
    *_: Any,
) -> PickledTensor:
    return _rebuild(storage, first, shape, stride, dtype=dtype)


def _rebuild_parameter(tensor: PickledTensor, *_: Any) -> PickledTensor:
    return tensor


TORCH_NAMES: Names = {
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch", "UntypedStorage"): torch.uint8,
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}
