"""Safetensors: the tensors of one file, or of the shards that the ranks of a job wrote. Knows no model.

Format: https://huggingface.co/docs/safetensors (eight bytes little-endian header length, JSON header, data). The writer
of torch.distributed.checkpoint.hf_storage puts into each rank's file the boxes that the rank had, and into its header
where in the whole tensor each of them begins.
"""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ts_parallel.checkpoint.formats.boxes import check_boxes
from ts_parallel.checkpoint.formats.placeholders import refuse_placeholder
from ts_parallel.checkpoint.stored import StoredPart, StoredTensor, stored_whole
from ts_parallel.errors import CheckpointError

_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_SETTINGS = "__metadata__"
_SHARDING = "DCP_SHARDING_INFO"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(file: Path) -> Iterator[StoredTensor]:
    """The tensors of one file.

    Raises:
        CheckpointError: it is cut off, or no safetensors file.
    """
    header, data_start = _read_header(file)
    yield from _tensors_of_header(file, header, data_start)


def read_distributed_safetensors(files: Sequence[Path]) -> Iterator[StoredTensor]:
    """The tensors of which each of `files` holds some boxes.

    Raises:
        CheckpointError: one is cut off or no such file, or the boxes of a tensor leave a gap or overlap.
    """
    pieces: dict[str, list[tuple[StoredTensor, tuple[int, ...]]]] = defaultdict(list)
    for file in files:
        header, data_start = _read_header(file)
        corners = _corners(file, header)
        for tensor in _tensors_of_header(file, header, data_start):
            corner = corners.get(tensor.name, ())
            if len(corner) != len(tensor.shape):
                raise CheckpointError(f"{file} does not say where its part of {tensor.name!r} begins")
            pieces[tensor.name].append((tensor, corner))
    for name, own in pieces.items():
        first = own[0][0]
        if any((piece.dtype, len(piece.shape)) != (first.dtype, len(first.shape)) for piece, _ in own):
            raise CheckpointError(f"the parts of {name!r} in {first.file.parent} differ in dtype or number of dims")
        parts = tuple(
            StoredPart(piece.file, corner, piece.shape, piece.offset, piece.num_bytes)
            for piece, corner in own
            if piece.num_bytes or len(own) == 1
        )
        # No file says the whole shape, so what is missing at its end shows only against the model's.
        ends = [[begin + size for begin, size in zip(part.corner, part.shape, strict=True)] for part in parts]
        shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
        check_boxes(name, shape, [(part.corner, part.shape) for part in parts], first.file.parent)
        yield StoredTensor(name, first.dtype, shape, parts)


def _corners(file: Path, header: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    try:
        sharding = json.loads(header[_SETTINGS][_SHARDING])
        corners = {name: tuple(entry["saved_offsets"]) for name, entry in sharding.items()}
        if any(type(number) is not int or number < 0 for corner in corners.values() for number in corner):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{file} does not say which parts of the tensors it holds ({_SHARDING})") from None
    return corners


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins."""
    refuse_placeholder(file)
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
    return header, 8 + length


def _tensors_of_header(file: Path, header: dict[str, Any], data_start: int) -> Iterable[StoredTensor]:
    size = file.stat().st_size
    for name, entry in header.items():
        if name == _SETTINGS:
            continue
        tensor = _stored_tensor(file, name, entry, data_start)
        if tensor.offset + tensor.num_bytes > size:
            missing = tensor.offset + tensor.num_bytes - size
            raise CheckpointError(f"{file} is cut off: {size} bytes, at least {missing} more are needed for {name!r}")
        yield tensor


def _stored_tensor(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        unknown = _unknown_dtype(entry)
        reason = f": no dtype {unknown} is known here; serve the checkpoint in bfloat16 or float16" * bool(unknown)
        raise CheckpointError(f"{file}: cannot read the entry of {name!r}: {entry!r}{reason}") from None
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(f"{file}: {name!r} has shape {list(shape)} of {entry['dtype']} but {end - begin} bytes")
    return stored_whole(name, file, dtype, shape, data_start + begin)


def _unknown_dtype(entry: Any) -> str:
    """Such as F4, of which torch has no numbers one by one; empty where something else is wrong."""
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    return dtype if isinstance(dtype, str) and dtype not in DTYPES else ""
