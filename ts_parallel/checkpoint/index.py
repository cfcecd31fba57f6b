"""A folder of safetensors as an index: name → file, dtype, shape, byte range. No weight is read.

Format: https://huggingface.co/docs/safetensors (eight bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ts_parallel.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a file, row-major from byte `offset`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


CheckpointIndex = Mapping[str, StoredTensor]


def read_index(folder: Path) -> CheckpointIndex:
    """The tensors of a Hugging Face safetensors folder, one file or sharded.

    Raises:
        CheckpointError: no such folder, no safetensors in it, a shard that is missing, cut off or no safetensors file.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder {folder}")
    if (folder / SINGLE_FILE).is_file():  # as transformers, where a folder holds both
        files = [folder / SINGLE_FILE]
    elif (folder / SHARD_INDEX).is_file():
        files = _files_of_shard_index(folder)
    else:
        raise CheckpointError(f"neither {SINGLE_FILE} nor {SHARD_INDEX} in {folder}")
    return {tensor.name: tensor for file in files for tensor in _tensors_of_file(file)}


def _files_of_shard_index(folder: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads((folder / SHARD_INDEX).read_text())["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a file name that is no text")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / SHARD_INDEX} is not a shard index: {error!r}") from None
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / SHARD_INDEX} names {name!r}, which is not a file of its own folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / SHARD_INDEX} names {name!r}, which is missing")
    return [folder / name for name in names]


def _tensors_of_file(file: Path) -> Iterable[StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size or length > _LONGEST_HEADER:
            raise CheckpointError(
                f"{file} is cut off or no safetensors file: {size} bytes, a header of {length} announced"
            )
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{file} is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is no safetensors file: its header is no JSON object")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        tensor = _stored_tensor(file, name, entry, data_start=8 + length)
        if tensor.offset + tensor.num_bytes > size:
            missing = tensor.offset + tensor.num_bytes - size
            raise CheckpointError(f"{file} is cut off: {size} bytes, at least {missing} more are needed for {name!r}")
        yield tensor


def _stored_tensor(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: cannot read the entry of {name!r}: {entry!r}") from None
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(f"{file}: {name!r} has shape {list(shape)} of {entry['dtype']} but {end - begin} bytes")
    return StoredTensor(name, file, dtype, shape, data_start + begin, end - begin)
